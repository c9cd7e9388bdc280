"""In-place operators become functional ones: ``relu_(x)`` -> ``relu(x)``, and later readers of x read the result.

Done on the exported graph itself where no other view of the mutated memory is read afterwards; other graphs go through
torch's own functionalization. Either way batch norm and dropout stay single nodes with their training flag, except that
a dropout in evaluation, whose result is its input itself, goes where that memory is written to afterwards. A write to an
input is not carried out on the caller's tensor, and step counters that nothing reads (``num_batches_tracked``) go.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
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
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    views = _Views(module)
    aliases = _drop_aliases(module, views, in_place, order)
    for node in in_place:
        source = mutated(node)
        assert source is not None
        functional = _functional(node)
        if functional is None or source.op == "get_attr" or views.read_after(source, node, order):
            return _by_torch(exported, aliases)
        node.target = functional
        if propagate(node, views.mode).dtype != source.meta["val"].dtype:
            # in place, the result is cast to the type of what it replaces
            return _by_torch(exported, aliases)
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)
    module.recompile()
    return module


def _drop_aliases(
    module: fx.GraphModule, views: _Views, in_place: list[fx.Node], order: dict[fx.Node, int]
) -> set[str]:
    """Erase the dropouts in evaluation whose memory is written to while another view of it is still to be read.

    Returns their names: torch's functionalization would copy there.
    """
    dropped = set()
    for node in in_place:
        source = mutated(node)
        assert source is not None
        if not views.read_after(source, node, order):
            continue
        for shared in list(views.sharing(source)):
            if ops.is_op(shared, "dropout") and mutated(shared) is None:
                shared.replace_all_uses_with(shared.all_input_nodes[0])
                module.graph.erase_node(shared)
                views.forget()
                dropped.add(shared.name)
    return dropped


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
        if all(mutated(node) in chain or ops.is_pure(node) for node in writes):
            for node in sorted(writes, reverse=True):
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

    def forget(self) -> None:
        """To be called when the graph has changed."""
        self._known.clear()

    def read_after(self, source: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
        """True where another view of ``source``'s memory is read after ``node`` has written to it."""
        for other in self.sharing(source):
            if other is source or order[other] > order[node]:
                continue
            if any(order[user] > order[node] for user in other.users):
                return True
        return False

    def sharing(self, node: fx.Node) -> Iterator[fx.Node]:
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


# Stand-ins that torch's functionalization keeps whole; it takes the operators themselves apart.
_LIBRARY = torch.library.Library("graphopt_capture", "DEF")  # type: ignore[no-untyped-call]
_HELD: dict[Any, Any] = {}


def _hold(target: Any) -> None:
    name, arguments = target._schema.name.split("::")[1], str(target._schema).split("(", 1)[1]
    _LIBRARY.define(f"{name}({arguments}")  # type: ignore[no-untyped-call]
    keep = "CompositeExplicitAutograd"
    _LIBRARY.impl(name, lambda x, *_: torch.empty_like(x), keep)  # type: ignore[no-untyped-call]
    _HELD[target] = getattr(torch.ops.graphopt_capture, name).default


for _name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "batch_norm"):
    _hold(getattr(aten, _name).default)
_RELEASED = {held: target for target, held in _HELD.items()}


def _by_torch(exported: ExportedProgram, aliases: Collection[str] = ()) -> fx.GraphModule:
    """torch's functionalization; ``aliases`` are dropouts that return their input itself."""
    held = []
    for graph_module in exported.graph_module.modules():
        if not isinstance(graph_module, fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            if node.target not in _HELD:
                continue
            held.append((graph_module, node, node.target, node.args))
            node.target = _HELD[node.target]
            if node.name in aliases:
                node.target, node.args = aten.alias.default, node.args[:1]
        graph_module.recompile()
    try:
        module = exported.run_decompositions({}).module(check_guards=False)
    finally:
        for graph_module, node, target, arguments in held:
            node.target, node.args = target, arguments
            graph_module.recompile()
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        node.target = _RELEASED.get(node.target, node.target)
        source = mutated(node)
        if source is not None and source.op == "placeholder" and not node.users:
            module.graph.erase_node(node)
    _drop_counters(module)
    module.recompile()
    return module
