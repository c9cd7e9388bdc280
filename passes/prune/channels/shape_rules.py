"""What operators that only move or copy elements do to channels: views, permutations, shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphopt.passes.prune.channels.factors import regroup
from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed
from graphopt.passes.prune.channels.walk import Walk, joined, rule, same_rest, shape_of

Answer = Dimensions | list[Dimensions]


@rule("contiguous", "clone", "alias", "detach", "lift_fresh_copy")
def same(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """The input itself, or a copy."""
    return walk.dims(node.args[0])


@rule("zero", "zeros_like")
def zeros(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Zeros of the same sizes."""
    dims = walk.dims(a["self"])
    return [d.like() if isinstance(d, Axis) else d for d in dims]


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


def _nothing(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Reads a type or a size of an axis that is fixed; the result has no channels."""
    if "size" in str(node.target) and "new" not in str(node.target):
        dims, axis = walk.dims(node.args[0]), node.args[1]
        walk.freeze(dims[axis], f"{node.name} computes with the number of its channels")  # type: ignore[index]
    return walk.fixed(node)


for _target in ("new_zeros", "new_ones", "new_full", "new_empty", "sym_size.int"):
    rule(_target)(_nothing)
