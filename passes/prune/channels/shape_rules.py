"""What operators that only move elements do to channels: views, permutations, concatenations, slices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.passes.prune.channels.factors import regroup
from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed
from graphopt.passes.prune.channels.walk import RULES, Walk, joined, rule, same_rest, shape_of

Answer = Dimensions | list[Dimensions]


@rule("contiguous", "clone", "alias", "detach", "lift_fresh_copy")
def same(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """The input itself, or a copy."""
    return walk.dims(node.args[0])


@rule("to.dtype", "to.dtype_layout", "_to_copy")
def cast(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Zero is zero in every type; other numbers may be rounded."""
    return [zero_or_unknown(d) for d in walk.dims(node.args[0])]


def zero_or_unknown(dimension: Dimension) -> Dimension:
    """The same axis where a removed channel that held zeros still does, and nothing is known of others."""
    if not isinstance(dimension, Axis) or dimension.is_zero:
        return dimension
    return dimension.like(rest=np.where(dimension.rest == 0, 0.0, UNKNOWN))


@rule("dropout")
def dropout(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """In training, zero stays zero; ``alpha_dropout`` shifts it."""
    source = walk.dims(a["input"])
    if not a["train"]:
        return source
    if "alpha" in str(node.target):
        return walk.give_up(node)
    return [zero_or_unknown(d) for d in source]


@rule("squeeze")
def squeeze(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Axes of one index go; channels that could become one index would go too, and so stay whole."""
    source, sizes = walk.dims(a["self"]), shape_of(a["self"])
    given = a.get("dim", range(len(source)))
    chosen = {axis % len(source) for axis in ([given] if isinstance(given, int) else given)}
    out: Dimensions = []
    for axis, (dimension, size) in enumerate(zip(source, sizes, strict=True)):
        if axis not in chosen:
            out.append(dimension)
        elif size != 1:
            out.append(walk.freeze(dimension, f"{node.name} would drop it if it were one channel"))
    return out


@rule("reshape", "view", "flatten", "unflatten", "unsqueeze", "_unsafe_view")
def reshape(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Axes merge and split; channels stay with one factor of theirs (see ``factors``)."""
    return regroup(walk, node, walk.dims(a["self"]), shape_of(a["self"]), shape_of(node))


@rule("reshape_as", "view_as")
def reshape_as(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A view of another value's sizes, whose channels it couples with."""
    out = regroup(walk, node, walk.dims(a["self"]), shape_of(a["self"]), shape_of(node))
    return [walk.tie(*pair, node) for pair in zip(out, walk.dims(a["other"]), strict=True)]


@rule("permute", "numpy_T")
def permute(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    source = walk.dims(a["self"])
    return [source[axis] for axis in a.get("dims", range(len(source))[::-1])]


@rule("transpose")
def transpose(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    out = walk.dims(a["self"])
    first, second = a["dim0"], a["dim1"]
    out[first], out[second] = out[second], out[first]
    return out


@rule("mT")
def matrix_transpose(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    *lead, rows, columns = walk.dims(a["self"])
    return [*lead, columns, rows]


@rule("t")
def t(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    return walk.dims(a["self"])[::-1]


@rule("expand")
def expand(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """New and widened axes are fixed."""
    source, old, new = walk.dims(a["self"]), shape_of(a["self"]), shape_of(node)
    added = len(new) - len(old)
    kept: Dimensions = [
        d if have == want else Fixed()
        for d, have, want in zip(source, old, new[added:], strict=True)
    ]
    return [*[Fixed()] * added, *kept]


@rule("flip")
def flip(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Channels in reverse order."""
    out = walk.dims(a["self"])
    for axis in a["dims"]:
        dimension = out[axis]
        if isinstance(dimension, Axis):
            out[axis] = dimension.like(dimension.ids[::-1].copy(), dimension.rest[::-1].copy())
    return out


@rule("roll")
def roll(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Rolled axes stay whole."""
    out = walk.dims(a["self"])
    for axis in a["dims"] or range(len(out)):
        out[axis] = walk.freeze(out[axis], f"{node.name} rolls its channels")
    return out


@rule("repeat")
def repeat(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """An axis repeated holds its channels several times over."""
    source, repeats = walk.dims(a["self"]), a["repeats"]
    out: Dimensions = [Fixed()] * (len(repeats) - len(source))
    for dimension, times in zip(source, repeats[len(out) :], strict=True):
        if isinstance(dimension, Axis) and times != 1:
            if not isinstance(times, int):
                return walk.give_up(node)
            dimension = joined([dimension] * times, walk.labels)
        out.append(dimension)
    return out


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


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``[c * r * r, h, w] -> [c, h * r, w * r]``: a channel of the output is r * r of the input."""
    *lead, channels = _but_pixels(walk, node, walk.dims(a["self"]))
    if isinstance(channels, Axis):
        square = int(a["upscale_factor"]) ** 2
        channels = collapse(walk, channels, np.arange(channels.size).reshape(-1, square))
    return [*lead, channels, Fixed(), Fixed()]


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``[c, h * r, w * r] -> [c * r * r, h, w]``."""
    *lead, channels = _but_pixels(walk, node, walk.dims(a["self"]))
    if isinstance(channels, Axis):
        square = int(a["downscale_factor"]) ** 2
        channels = channels.like(np.repeat(channels.ids, square), np.repeat(channels.rest, square))
    return [*lead, channels, Fixed(), Fixed()]


def _but_pixels(walk: Walk, node: fx.Node, source: Dimensions) -> Dimensions:
    for dimension in source[-2:]:
        walk.freeze(dimension, f"{node.name} moves pixels")
    return source[:-2]


def collapse(walk: Walk, axis: Axis, blocks: Any) -> Axis:
    """One channel for each row of ``blocks``, whose indices go together."""
    ids = axis.ids[blocks]
    walk.labels.tie(np.repeat(ids[:, 0], ids.shape[1] - 1), ids[:, 1:].ravel())
    return axis.like(np.ascontiguousarray(ids[:, 0]), same_rest(axis.rest[blocks].T))


@rule("channel_shuffle")
def channel_shuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Channel j of every group goes together: the groups stay equally large and in step."""
    source, groups = walk.dims(a["self"]), int(a["groups"])
    channels = source[1]
    if isinstance(channels, Axis):
        blocks = np.arange(channels.size).reshape(groups, -1).T
        collapse(walk, channels, blocks)
        order = blocks.ravel()
        source[1] = channels.like(channels.ids[order], channels.rest[order])
    return source


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


def _nothing(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Reads a type or a size of an axis that is fixed; the result has no channels."""
    if "size" in str(node.target) and "new" not in str(node.target):
        dims, axis = walk.dims(node.args[0]), node.args[1]
        walk.freeze(dims[axis], f"{node.name} computes with the number of its channels")  # type: ignore[index]
    return walk.fixed(node)


for _target in ("new_zeros", "new_ones", "new_full", "new_empty", "sym_size.int"):
    rule(_target)(_nothing)
