"""In-place operators become functional ones: ``relu_(x)`` -> ``relu(x)``, and later readers of x read the result.

Done on the exported graph itself where the mutated tensor has no views, so that batch norm and dropout stay single
nodes with their training flag; a graph with mutated views goes through torch's own functionalization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten


def functionalize(exported: ExportedProgram, module: fx.GraphModule) -> fx.GraphModule:
    """``module`` without in-place calls; ``exported`` is what it was made from."""
    in_place = [node for node in module.graph.nodes if _mutated(node) is not None]
    if not in_place:
        return module
    if any(_functional(node) is None or _is_aliased(_mutated(node)) for node in in_place):
        return _by_torch(exported)
    for node in in_place:
        _make_functional(node)
    module.recompile()
    return module


def _mutated(node: fx.Node) -> fx.Node | None:
    """The node whose tensor ``node`` writes to, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = node.target._schema.arguments
    for argument, value in zip(arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value if isinstance(value, fx.Node) else None
    return None


def _functional(node: fx.Node) -> Any | None:
    """The overload without the trailing underscore, or None where there is none."""
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = node.target._overloadname  # type: ignore[union-attr]
    return getattr(packet, overload, None) if packet is not None else None


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    aliased = any(value.alias_info is not None for value in returns)
    # Composite operators (reshape, flatten, contiguous, chunk) may return views without saying so.
    unsaid = {"reshape", "flatten", "contiguous", "chunk", "to", "unflatten", "dropout", "split"}
    return _mutated(node) is None and (aliased or node.target._schema.name.split("::")[1] in unsaid)


def _is_aliased(node: fx.Node | None) -> bool:
    """True where another value shares the mutated tensor's memory, or it is an input or parameter."""
    if node is None or node.op != "call_function":
        return True
    return _is_view(node) or any(_is_view(user) for user in node.users)


def _make_functional(node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.target = _functional(node)
    order = {other: index for index, other in enumerate(node.graph.nodes)}
    for user in list(source.users):
        if order[user] > order[node]:
            user.replace_input_with(source, node)


def _by_torch(exported: ExportedProgram) -> fx.GraphModule:
    module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.target == aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(node)
    module.recompile()
    return module


def _restore_batch_norm(node: fx.Node) -> None:
    """``getitem(_native_batch_norm_legit_no_training(...), 0)`` -> ``batch_norm(..., training=False)``."""
    x, weight, bias, mean, variance, momentum, epsilon = node.args
    with node.graph.inserting_before(node):
        arguments = (x, weight, bias, mean, variance, False, momentum, epsilon, False)
        restored = node.graph.call_function(aten.batch_norm.default, arguments)
    for user in list(node.users):
        restored.meta = dict(user.meta)
        user.replace_all_uses_with(restored)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
