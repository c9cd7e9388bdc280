"""What a program would cost after a choice of channels, without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from graphopt import ops
from graphopt.passes.prune.channels.coupling import Coupling
from graphopt.passes.prune.channels.group import Group
from graphopt.passes.prune.channels.labels import Axis, Dimension, Ids


@dataclass(frozen=True)
class Cost:
    """Elements of parameters and buffers (pruning masks excepted), and multiply-accumulates at the example shapes, as ``Program.stats`` counts them."""

    parameters: int
    macs: int


class CostModel:
    """``model(keep)`` is the cost of ``shrink(edit, keep)``: every count is a product of what is left of some axes."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self._parameters = list(_parameter_terms(coupling))
        self._macs = list(_mac_terms(coupling))

    def __call__(self, keep: Mapping[Group, Tensor]) -> Cost:
        kept = self.coupling.kept(keep)
        left: dict[int, int] = {}
        return Cost(
            sum(self._left(term, kept, left) for term in self._parameters) + self._new_biases(kept),
            sum(self._left(term, kept, left) for term in self._macs),
        )

    def _new_biases(self, kept: NDArray[np.bool_]) -> int:
        """Elements of the biases that take constants and were not there before."""
        walk, of = self.coupling.walk, self.coupling.classes.of
        number = 0
        for node, ids, rest in walk.folds:
            if ops.bind(node)["bias"] is None and (~kept[of[ids]] & (rest != 0)).any():
                outputs = ops.bind(node)["weight"].meta["val"].shape[0]
                dimension = walk.layers[node]
                is_axis = isinstance(dimension, Axis)
                number += int(kept[of[dimension.ids]].sum()) if is_axis else outputs  # type: ignore[union-attr]
        return number

    def _left(
        self, term: tuple[int, list[Ids]], kept: NDArray[np.bool_], left: dict[int, int]
    ) -> int:
        number, axes = term
        for ids in axes:
            if id(ids) not in left:
                left[id(ids)] = int(kept[self.coupling.classes.of[ids]].sum())
        return number * prod(left[id(ids)] for ids in axes) // prod(ids.size for ids in axes)


def _parameter_terms(coupling: Coupling) -> list[tuple[int, list[Ids]]]:
    walk, terms = coupling.walk, []
    graph = coupling.program.graph
    masks = {str(pair[1].target) for node in graph.nodes if (pair := ops.masked(node)) is not None}
    nodes = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    for name, node in nodes.items():
        if name in masks:
            continue
        tensor = coupling.program.tensor(node)
        axes = _named(walk.parameters[id(tensor)])
        if name in walk.per_group:
            axes = [*_named(walk.parameters[id(tensor)][:1]), walk.per_group[name]]
        terms.append((tensor.numel(), axes))
    return terms


def _mac_terms(coupling: Coupling) -> list[tuple[int, list[Ids]]]:
    return [
        (ops.macs(node), _mac_axes(coupling, node))
        for node in coupling.program.graph.nodes
        if node.op == "call_function" and ops.macs(node)
    ]


def _mac_axes(coupling: Coupling, node: fx.Node) -> list[Ids]:
    """The axes whose sizes are factors of a call's multiply-accumulates."""
    op = ops.info(node)
    walk = coupling.walk
    if op is None:
        return []
    values = list(ops.bind(node).values())
    if op.kind == "convolution":
        weight = ops.bind(node)["weight"]
        names = {name for d in walk.dims(weight) if isinstance(d, Axis) for name, _ in d.slots}
        grouped = [walk.per_group[name] for name in sorted(names & set(walk.per_group))][:1]
        return [*_named(walk.dims(node)), *(grouped or _named(walk.dims(weight)[1:2]))]
    if op.kind == "transposed_convolution":
        return [*_named(walk.dims(values[0])), *_named(walk.dims(values[1])[1:2])]
    if op.name == "linear":
        return [*_named(walk.dims(node)), *_named(walk.dims(values[1])[-1:])]
    if op.name == "attention":
        return _named(walk.dims(values[0]))
    first = values[1] if op.name == "addmm" else values[0]
    return [*_named(walk.dims(node)), *_named(walk.dims(first)[-1:])]


def _named(dims: list[Dimension]) -> list[Ids]:
    return [d.ids for d in dims if isinstance(d, Axis) and d.is_named]
