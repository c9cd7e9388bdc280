"""The arguments of calls that hold numbers of channels, after some channels are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt import ops
from graphopt.edit import Edit
from graphopt.passes.prune.channels.coupling import Coupling
from graphopt.passes.prune.channels.labels import Axis, Dimension
from graphopt.passes.prune.channels.walk import shape_of

aten = torch.ops.aten
Kept = NDArray[np.bool_]


class _Counts:
    """What is left of each axis."""

    def __init__(self, coupling: Coupling, kept: Kept) -> None:
        self.coupling, self.kept = coupling, kept

    def stays(self, dimension: Dimension) -> NDArray[np.bool_] | None:
        """For each index whether it stays; None where all do."""
        if not isinstance(dimension, Axis):
            return None
        stays: NDArray[np.bool_] = self.kept[self.coupling.classes.of[dimension.ids]]
        return None if stays.all() else stays

    def left(self, dimension: Dimension) -> int | None:
        """The number of indices that stay, None where all do."""
        stays = self.stays(dimension)
        return None if stays is None else int(stays.sum())

    def dims(self, value: Any) -> list[Dimension]:
        return self.coupling.walk.dims(value)


Rewrite = Callable[[Edit, fx.Node, dict[str, Any], _Counts], None]


def rewrite_arguments(edit: Edit, node: fx.Node, coupling: Coupling, kept: Kept) -> None:
    """Give a call the sizes that its channels have now."""
    rewrite = _REWRITES.get(node.target)
    if rewrite is not None:
        rewrite(edit, node, ops.bind(node), _Counts(coupling, kept))


def _sizes(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    """``view(x, sizes)``: -1 and sizes that are computed stay."""
    name = next(name for name in ("size", "shape", "sizes") if name in a)
    sizes, dims = list(a[name]), counts.dims(node)
    first = a["dim"] % len(counts.dims(a["self"])) if "dim" in a else 0
    for index, size in enumerate(sizes):
        left = counts.left(dims[first + index])
        if left is not None and isinstance(size, int) and size != -1:
            sizes[index] = left
    if sizes != list(a[name]):
        edit.replace_argument(node, name, sizes)


def _parts(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    """Parts may differ in size now: ``chunk`` and ``split`` become ``split_with_sizes``."""
    dims = counts.dims(a["self"])
    along = a["dim"] % len(dims)
    if counts.left(dims[along]) is None:
        return
    values = node.meta["val"]
    parts = counts.coupling.walk.values[node]
    lefts = [counts.left(part[along]) for part in parts]  # type: ignore[index]
    sizes = [
        int(value.shape[along]) if left is None else left
        for value, left in zip(values, lefts, strict=True)
    ]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (a["self"], sizes, along), {}
    edit.rewrites += 1


def _slice(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    dims = counts.dims(a["self"])
    along = a["dim"] % len(dims)
    stays = counts.stays(dims[along])
    if stays is None:
        return
    start, end, _ = slice(a["start"], a["end"]).indices(len(stays))
    first = int(stays[:start].sum())
    edit.replace_argument(node, "start", first)
    edit.replace_argument(node, "end", first + int(stays[start:end].sum()))


def _groups(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    """Whole groups go where a group has one input or one output; otherwise all groups stay, each smaller."""
    groups = int(a["groups"])
    if groups == 1:
        return
    at = 1 - len(shape_of(a["weight"]))  # the channels' axis, with a batch or without
    left = counts.left(counts.dims(a["input"])[at])
    inputs, outputs = shape_of(a["input"])[at] // groups, shape_of(node)[at] // groups
    if left is not None and (inputs == 1 or outputs == 1):
        edit.replace_argument(node, "groups", left // inputs)


def _norm_groups(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    stays = counts.stays(counts.dims(a["input"])[1])
    if stays is not None:
        left = int(a["num_groups"]) * int(stays.sum()) // len(stays)
        edit.replace_argument(node, "num_groups", left)


def _scale(edit: Edit, node: fx.Node, a: dict[str, Any], counts: _Counts) -> None:
    """``1 / sqrt(features)`` of the features that there were."""
    if a["scale"] is None and counts.left(counts.dims(a["query"])[-1]) is not None:
        features = shape_of(a["query"])[-1]
        node.kwargs = {**node.kwargs, "scale": features**-0.5}
        edit.rewrites += 1


_REWRITES: dict[Any, Rewrite] = {
    target: rewrite
    for rewrite, names in (
        (_sizes, ("reshape", "view", "expand", "unflatten")),
        (_parts, ("split", "chunk")),
        (_slice, ("slice",)),
        (_groups, tuple(op.name for op in ops.TABLE if "convolution" in op.kind)),
        (_norm_groups, ("group_norm",)),
        (_scale, ("attention",)),
    )
    for name in names
    for target in ops.BY_NAME[name].targets
} | {aten.slice_scatter.default: _slice}
