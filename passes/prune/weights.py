"""The weights that can be pruned: who reads them, through which mask and fake quantization, and why others cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt import ops
from graphopt.passes import layer
from graphopt.passes.prune.layout import LAYERS, Layout
from graphopt.program import Program

Decline = Callable[[fx.Node, str], None]


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter ``W``, with mask ``M`` or without, and the layers that read ``W`` or ``W * M``.

    ``values`` are the nodes that hold what is multiplied: the ``get_attr`` nodes, or ``mul(W, M)``; a fake quantization
    stands after them.
    """

    name: str
    sources: tuple[fx.Node, ...]
    mask: fx.Node | None
    values: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    layout: Layout

    @property
    def size(self) -> int:
        return math.prod(self.layout.shape)

    def tensor(self, program: Program) -> Tensor:
        """``W``, with what the mask hides; in the CPU's memory, where what is pruned is decided."""
        return program.tensor(self.sources[0]).detach().cpu()

    def old_mask(self, program: Program) -> Tensor | None:
        return None if self.mask is None else program.tensor(self.mask).cpu()

    def on_device(self, program: Program, value: Tensor) -> Tensor:
        """``value`` where ``W`` is, in its element type."""
        return value.to(program.tensor(self.sources[0]).detach())

    def effective(self, program: Program) -> Tensor:
        """``W * M``."""
        mask = self.old_mask(program)
        return self.tensor(program) if mask is None else self.tensor(program) * mask


@dataclass(frozen=True)
class Selection:
    """Which layers are offered to the pass: patterns as in ``layer.chosen``, and whether the outermost are left out."""

    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_first: bool = False
    keep_last: bool = False
    min_weights: int = 1


def find(program: Program, selection: Selection, decline: Decline) -> list[Weight]:
    """The weights of the chosen layers, in the graph's order; ``decline`` is told of every other layer, and why.

    A weight that several layers read is one weight with one mask; it is declined where anything else reads it too.
    """
    excluded = _excluded(program, selection)
    by_tensor: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if not ops.is_op(node, *LAYERS):
            continue
        source = _source(ops.bind(node)["weight"])
        if source is None:
            decline(node, "its weight is computed")
        else:
            by_tensor.setdefault(id(program.tensor(source)), []).append(node)
    found = []
    for layers in by_tensor.values():
        weight = _weight(program, layers)
        reason = weight if isinstance(weight, str) else _unfit(program, weight, selection, excluded)
        if reason is None:
            assert isinstance(weight, Weight)
            found.append(weight)
            continue
        for node in layers:
            decline(node, excluded.get(node, reason))
    return found


def _source(value: fx.Node) -> fx.Node | None:
    """The ``get_attr`` node of a weight, behind its fake quantization and mask; None where it is computed."""
    if "fake_quantize" in str(value.target) and value.op == "call_function":
        value = value.all_input_nodes[0]
    pair = ops.masked(value)
    if pair is not None:
        return pair[0]
    return value if value.op == "get_attr" else None


def _weight(program: Program, layers: list[fx.Node]) -> Weight | str:
    """The weight that ``layers`` read, or why it cannot have one mask."""
    tensor = program.tensor(_source_of(layers[0]))
    sources = tuple(
        n for n in program.graph.nodes if n.op == "get_attr" and program.tensor(n) is tensor
    )
    masks: dict[str, fx.Node] = {}
    values: list[fx.Node] = []
    for source in sources:
        for user in source.users:
            pair = ops.masked(user)
            if pair is not None and pair[0] is source:
                masks.setdefault(str(pair[1].target), pair[1])
                values.append(user)
            elif source not in values:
                values.append(source)
    if len(masks) > 1 or (masks and any(value.op == "get_attr" for value in values)):
        return "its weight is shared by layers with different masks"
    stranger = _stranger(values, set(layers))
    if stranger is not None:
        return f"its weight is also read by {stranger.name}"
    layouts = {Layout.of(node) for node in layers}
    if len(layouts) > 1:
        return "its weight is shared by layers that read its axes differently"
    mask = next(iter(masks.values()), None)
    target = str(sources[0].target)
    return Weight(target, sources, mask, tuple(values), tuple(layers), layouts.pop())


def _source_of(node: fx.Node) -> fx.Node:
    source = _source(ops.bind(node)["weight"])
    assert source is not None
    return source


def _stranger(values: Iterable[fx.Node], layers: set[fx.Node]) -> fx.Node | None:
    """A reader of ``values`` that does not read them as the weight of one of ``layers``."""
    for value in values:
        for user in value.users:
            if "fake_quantize" in str(user.target):
                found = _stranger([user], layers)
                if found is not None:
                    return found
            elif (ops.masked(user) is None and user not in layers) or user.all_input_nodes.count(
                value
            ) > 1:
                return user
    return None


def _unfit(
    program: Program, weight: Weight, selection: Selection, excluded: dict[fx.Node, str]
) -> str | None:
    tensor = weight.tensor(program)
    if not tensor.is_floating_point():
        return f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() < selection.min_weights:
        return f"it has {tensor.numel()} weights, fewer than min_weights={selection.min_weights}"
    for node in weight.layers:
        if node in excluded:
            return f"its weight is shared with {node.name}, which is left out"
    return None


def _excluded(program: Program, selection: Selection) -> dict[fx.Node, str]:
    """The layers that the options leave out, each with the reason."""
    nodes = [n for n in program.graph.nodes if ops.is_op(n, *LAYERS)]
    reasons = {
        node: "left out by the options layers and exclude"
        for node in nodes
        if not layer.chosen(node, selection.layers, selection.exclude)
    }
    if selection.keep_first:
        behind = _reached(program.graph.nodes, nodes, lambda node: node.all_input_nodes)
        reasons.update({n: "a first layer (keep_first)" for n in nodes if n not in behind})
    if selection.keep_last:
        before = _reached(reversed(program.graph.nodes), nodes, lambda node: list(node.users))
        reasons.update({n: "a last layer (keep_last)" for n in nodes if n not in before})
    return reasons


def _reached(
    nodes: Iterable[fx.Node],
    layers: Iterable[fx.Node],
    neighbours: Callable[[fx.Node], Iterable[fx.Node]],
) -> set[fx.Node]:
    """The nodes with one of ``layers`` among what ``neighbours`` leads to, transitively."""
    starts, reached = set(layers), set[fx.Node]()
    for node in nodes:
        near = neighbours(node)
        if any(other in starts or other in reached for other in near):
            reached.add(node)
    return reached
