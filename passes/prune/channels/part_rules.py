"""What operators that join values and take them apart do to channels: concatenations, splits, slices, padding."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed
from graphopt.passes.prune.channels.walk import RULES, Walk, joined, rule, same_rest, shape_of

Answer = Dimensions | list[Dimensions]


@rule("concat", "cat")
def concat(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Channels end to end; along another axis the operands' channels are coupled."""
    operands = [walk.dims(v) for v in a["tensors"]]
    if len({len(dims) for dims in operands}) > 1:
        return walk.give_up(node)
    along = a["dim"] % len(operands[0])
    sizes = [shape_of(v)[along] for v in a["tensors"]]
    return [
        _end_to_end(walk, [dims[axis] for dims in operands], sizes)
        if axis == along
        else _coupled(walk, node, [dims[axis] for dims in operands])
        for axis in range(len(operands[0]))
    ]


@rule("stack")
def stack(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A new axis; the operands' channels are coupled."""
    operands = [walk.dims(v) for v in a["tensors"]]
    out = [_coupled(walk, node, list(dims)) for dims in zip(*operands, strict=True)]
    out.insert(a["dim"] % (len(out) + 1), Fixed())
    return out


def _end_to_end(walk: Walk, parts: Dimensions, sizes: list[int]) -> Dimension:
    if not any(isinstance(part, Axis) for part in parts):
        return next((p for p in parts if isinstance(p, Fixed) and p.reason), Fixed())
    axes = []
    for part, size in zip(parts, sizes, strict=True):
        if isinstance(part, Fixed):
            reason = part.reason or "its channels stand beside an axis that has no channels"
            part = Axis(walk.labels, size, rest=np.full(size, UNKNOWN))
            walk.freeze(part, reason)
        axes.append(part)
    return joined(axes, walk.labels)


def _coupled(walk: Walk, node: fx.Node, parts: Dimensions) -> Dimension:
    tied = parts[0]
    for part in parts[1:]:
        tied = walk.tie(tied, part, node)
    if not isinstance(tied, Axis):
        for part in parts:
            walk.freeze(part, tied.reason or f"its channels meet no channels at {node.name}")
        return tied
    return tied.like(rest=same_rest(np.stack([p.rest for p in parts if isinstance(p, Axis)])))


@rule("split", "chunk", "unbind.int")
def split(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Each part takes its channels with it."""
    source = walk.dims(a["self"])
    parts = [list(value.shape) for value in node.meta["val"]]
    along = a["dim"] % len(source)
    dimension = source[along]
    if len(parts[0]) < len(source):  # unbind
        walk.freeze(dimension, f"{node.name} takes its channels apart")
        return [source[:along] + source[along + 1 :] for _ in parts]
    if not isinstance(dimension, Axis):
        return [source for _ in parts]
    ends = list(accumulate(shape[along] for shape in parts))
    ranges = zip([0, *ends], ends, strict=False)
    return [_replaced(source, along, _part(dimension, slice(*r))) for r in ranges]


def _part(axis: Axis, indices: slice) -> Axis:
    return axis.like(axis.ids[indices], axis.rest[indices])


def _replaced(dims: Dimensions, at: int, dimension: Dimension) -> Dimensions:
    return [*dims[:at], dimension, *dims[at + 1 :]]


def getitem(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """One of several outputs."""
    source, index = node.args
    found = walk.values[source]  # type: ignore[index]
    if found and isinstance(found[0], list):
        return found[index]  # type: ignore[index]
    return walk.give_up(node)


RULES[operator.getitem] = getitem


@rule("slice")
def slice_(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A run of channels; channels taken at a stride stay whole."""
    source = walk.dims(a["self"])
    along = a["dim"] % len(source)
    dimension = source[along]
    if not isinstance(dimension, Axis):
        return source
    if not all(isinstance(v, int | None) for v in (a["start"], a["end"])):
        return walk.give_up(node)
    if a["step"] != 1:
        return _replaced(source, along, walk.freeze(dimension, f"{node.name} strides over it"))
    part = _part(dimension, slice(*_bounds(a, dimension.size)))
    return _replaced(source, along, part)


@rule("slice_scatter")
def slice_scatter(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A run of channels replaced by others, which they go with."""
    target, source = walk.dims(a["self"]), walk.dims(a["src"])
    along = a["dim"] % len(target)
    pairs = enumerate(zip(target, source, strict=True))
    out = [d if axis == along else _coupled(walk, node, [d, e]) for axis, (d, e) in pairs]
    dimension, part = target[along], source[along]
    if not isinstance(dimension, Axis) or not isinstance(part, Axis) or a["step"] != 1:
        reason = f"{node.name} writes into it"
        out[along] = walk.freeze(dimension, reason)
        walk.freeze(part, reason)
        return out
    start, end = _bounds(a, dimension.size)
    walk.labels.tie(dimension.ids[start:end], part.ids)
    rest = dimension.rest.copy()
    rest[start:end] = part.rest
    out[along] = dimension.like(rest=rest if rest.any() else None)
    return out


def _bounds(a: dict[str, Any], size: int) -> tuple[int, int]:
    start, end, _ = slice(a["start"], a["end"]).indices(size)
    return start, max(start, end)


@rule("select")
def select(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """One index of an axis, which stays whole."""
    source = walk.dims(a["self"])
    along = a["dim"] % len(source)
    walk.freeze(source[along], f"{node.name} selects one of its channels")
    return source[:along] + source[along + 1 :]


@rule("index.Tensor")
def index(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A table looked up along one axis."""
    source, indices = walk.dims(a["self"]), list(a["indices"])
    given = [axis for axis, value in enumerate(indices) if value is not None]
    if len(given) != 1 or indices[given[0]].meta["val"].dtype in (torch.bool, torch.uint8):
        return walk.give_up(node)
    along = given[0]
    for dimension in walk.dims(indices[along]):
        walk.freeze(dimension, f"{node.name} looks up by it")
    walk.freeze(source[along], f"{node.name} looks its channels up")
    rank = len(walk.dims(indices[along]))
    return [*source[:along], *[Fixed()] * rank, *source[along + 1 :]]


@rule("pad")
def pad(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Padded channels are fixed ones beside the others; beside padded pixels, zero stays zero where the padding is."""
    source, amounts = walk.dims(a["self"]), list(a["pad"])
    constant = a.get("mode", "constant") == "constant"
    value = float(a.get("value") or 0)
    padded = {len(source) - 1 - k: amounts[2 * k : 2 * k + 2] for k in range(len(amounts) // 2)}
    out: Dimensions = []
    for axis, dimension in enumerate(source):
        if not isinstance(dimension, Axis):
            out.append(dimension)
            continue
        rest = dimension.rest
        if constant and any(any(v) for k, v in padded.items() if k != axis):
            rest = np.where(rest == value, value, UNKNOWN)
            dimension = dimension.like(rest=rest if rest.any() else None)
        if any(padded.get(axis, ())):
            dimension = _beside_padding(walk, node, dimension, padded[axis], constant)
        out.append(dimension)
    return out


def _beside_padding(
    walk: Walk, node: fx.Node, axis: Axis, amounts: Sequence[Any], constant: bool
) -> Dimension:
    if not constant or not all(isinstance(n, int) and n >= 0 for n in amounts):
        return walk.freeze(axis, f"{node.name} pads its channels")
    ends = [Axis(walk.labels, n, rest=np.full(n, UNKNOWN)) for n in amounts]
    for end in ends:
        walk.freeze(end, f"its channels meet the padding of {node.name}")
    return joined([ends[0], axis, ends[1]], walk.labels)
