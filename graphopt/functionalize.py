"""In-place operators become functional ones: ``relu_(x)`` -> ``relu(x)``, and later readers of x read the result.

Done on the exported graph itself where no other view of the mutated memory is read afterwards, so that batch norm and
dropout stay single nodes with their training flag; other graphs go through torch's own functionalization. A write to an
input is not carried out on the caller's tensor, and step counters that nothing reads (``num_batches_tracked``) go.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.edit import graph_mode, propagate

aten = torch.ops.aten


def functionalize(exported: ExportedProgram, module: fx.GraphModule) -> fx.GraphModule:
    """``module`` without in-place calls; ``exported`` is what it was made from."""
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in module.graph.nodes):
        return _by_torch(exported)  # a `with torch.no_grad()` of the model is a graph of its own
    _drop_counters(module)
    in_place = [node for node in module.graph.nodes if mutated(node) is not None]
    if not in_place:
        return module
    for node in list(module.graph.nodes):
        if ops.is_op(node, "dropout") and ops.is_pure(node):
            # It returns its input itself, and torch's functionalization copies instead.
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    views = _Views(module)
    for node in in_place:
        source = mutated(node)
        assert source is not None
        functional = _functional(node)
        if functional is None or source.op == "get_attr" or views.read_after(source, node, order):
            return _by_torch(exported)
        node.target = functional
        if propagate(node, views.mode).dtype != source.meta["val"].dtype:
            return _by_torch(
                exported
            )  # in place, the result is cast to the type of what it replaces
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)
    module.recompile()
    return module


def mutated(node: fx.Node) -> fx.Node | None:
    """The node whose tensor ``node`` writes to, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument, value in ops.bind(node).items():
        schema = next(a for a in node.target._schema.arguments if a.name == argument)
        written = schema.alias_info is not None and schema.alias_info.is_write
        if written and isinstance(value, fx.Node):
            return value
    return None


def _drop_counters(module: fx.GraphModule) -> None:
    """Erase the in-place calls on scalar buffers that nothing else reads."""
    for buffer in module.graph.find_nodes(op="get_attr"):
        value = buffer.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim():
            continue
        chain = [buffer]
        for node in chain:
            chain.extend(user for user in node.users if user not in chain)
        writes = chain[1:]
        if all(mutated(node) in chain for node in writes):
            for node in reversed(writes):
                module.graph.erase_node(node)


def _functional(node: fx.Node) -> Any | None:
    """The overload without the trailing underscore, or None where there is none."""
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = node.target._overloadname  # type: ignore[union-attr]
    return getattr(packet, overload, None) if packet is not None else None


class _Views:
    """Which values share memory, found by running the operators on fake tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.mode = graph_mode(module.graph)
        self._known: dict[fx.Node, bool] = {}

    def read_after(self, source: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
        """True where another view of ``source``'s memory is read after ``node`` has written to it."""
        for other in self._sharing(source):
            if other is source or order[other] > order[node]:
                continue
            if any(order[user] > order[node] for user in other.users):
                return True
        return False

    def _sharing(self, node: fx.Node) -> Iterator[fx.Node]:
        """Every value reachable from ``node`` along views, up to their bases and down again."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            yield current
            near = [user for user in current.users if self._is_view(user)]
            if self._is_view(current):
                near.extend(current.all_input_nodes)
            stack.extend(n for n in near if n not in seen)
            seen.update(near)

    def _is_view(self, node: fx.Node) -> bool:
        if node not in self._known:
            self._known[node] = self._shares_memory(node)
        return self._known[node]

    def _shares_memory(self, node: fx.Node) -> bool:
        if node.op != "call_function" or mutated(node) is not None:
            return False
        if node.target is operator.getitem:
            return self._is_view(node.args[0])  # type: ignore[arg-type]
        given = {s for n in node.all_input_nodes for s in _storages(n.meta.get("val"))}
        return bool(given & _storages(propagate(node, self.mode)))


def _storages(value: Any) -> set[int]:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _by_torch(exported: ExportedProgram) -> fx.GraphModule:
    module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.target == aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(node)
        source = mutated(node)
        if source is not None and source.op == "placeholder" and not node.users:
            module.graph.erase_node(node)
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
