"""What operators on single elements, on windows and on whole axes do to channels.

A function f of elements turns a removed channel's zeros into f(0), which is computed by running the operator. ``0 * x``
is zero whatever x is: so a gate, ``x * sigmoid(...)``, stays zero though sigmoid(0) is 1/2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt import ops
from graphopt.arrays import to_numpy
from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed, Rest
from graphopt.passes.prune.channels.shape_rules import zero_or_unknown
from graphopt.passes.prune.channels.walk import POINTWISE, RULES, Walk, rule, shape_of

Answer = Dimensions | list[Dimensions]
_MULTIPLIES = ("mul",)


def pointwise(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Operands broadcast: channels of one size couple, an axis of one index takes the other's channels."""
    sizes = shape_of(node)
    operands = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    out: Dimensions = []
    for axis in range(len(sizes)):
        parts = {n: _part(walk, n, axis - len(sizes), sizes[axis]) for n in operands}
        out.append(_meet(walk, node, parts))
    return out


RULES[POINTWISE] = pointwise


def _part(walk: Walk, operand: fx.Node, axis: int, size: int) -> Dimension | None:
    """An operand's axis (counted from the end), None where it is broadcast along it."""
    shape = shape_of(operand)
    if len(shape) < -axis or (shape[axis] == 1 and size > 1):
        return None
    return walk.dims(operand)[axis]


def _meet(walk: Walk, node: fx.Node, parts: dict[fx.Node, Dimension | None]) -> Dimension:
    present = [part for part in parts.values() if part is not None]
    if not present:
        return Fixed()
    tied = present[0]
    for part in present[1:]:
        tied = walk.tie(tied, part, node)
    if isinstance(tied, Fixed):
        for part in present:
            walk.freeze(part, tied.reason or f"its channels meet no channels at {node.name}")
        return tied
    rest = _rest(walk, node, parts, tied)
    slots = frozenset(slot for part in present if isinstance(part, Axis) for slot in part.slots)
    return Axis(walk.labels, tied.size, tied.ids, rest if rest.any() else None, slots)


def _rest(walk: Walk, node: fx.Node, parts: dict[fx.Node, Dimension | None], tied: Axis) -> Rest:
    """What removed channels hold after the operator."""
    held = {n: p.rest if isinstance(p, Axis) else None for n, p in parts.items()}
    computed = np.full(tied.size, UNKNOWN)
    if all(n.meta["val"].is_floating_point() for n in (node, *held)):
        values = {n: _value(walk, n, rest, tied.size) for n, rest in held.items()}
        computed = _run(node, values)
        known = np.all([to_numpy(torch.isfinite(v)) for v in values.values()], axis=0)
        broken = known & ~np.isfinite(computed)
        if broken.any():
            walk.labels.freeze(tied.ids[broken], f"{node.name} of zeros is not finite")
    zeros = [rest == 0 for rest in held.values() if rest is not None]
    if ops.is_op(node, *_MULTIPLIES):
        computed = np.where(np.any(zeros, axis=0), 0.0, computed)
    elif ops.is_op(node, "div") and _divides_by_broadcast(node, held):
        computed = np.where(held[node.args[0]] == 0, 0.0, computed)  # type: ignore[index]
    return np.where(np.isfinite(computed), computed, UNKNOWN)


def _divides_by_broadcast(node: fx.Node, held: dict[fx.Node, Rest | None]) -> bool:
    numerator, divisor = node.args[:2]
    return held.get(numerator) is not None and held.get(divisor) is None  # type: ignore[arg-type]


def _value(walk: Walk, operand: fx.Node, rest: Rest | None, size: int) -> torch.Tensor:
    """One number a channel: what the operand holds, NaN where it has no channels here and more than one number."""
    dtype = operand.meta["val"].dtype
    if rest is not None:
        return torch.as_tensor(rest).to(dtype)
    if operand.op == "get_attr" and operand.meta["val"].numel() == 1:
        return walk.program.tensor(operand).detach().cpu().reshape(1).expand(size)
    return torch.full((size,), UNKNOWN, dtype=dtype)


def _run(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> Rest:
    """The operator on one number a channel."""
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    with torch.no_grad():
        result: Rest = to_numpy(node.target(*args, **kwargs).double())  # type: ignore[operator]
    return result


@rule("fake_quantize", "fake_quantize_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine")
def fake_quantize(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Zero is a point of every grid."""
    return [zero_or_unknown(d) for d in walk.dims(a["self"])]


@rule("fake_quantize_channel", "_fake_quantize_learnable_per_channel_affine")
def fake_quantize_channel(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A scale and a zero point a channel, which go with it."""
    out = walk.dims(a["self"])
    for name in ("scale", "zero_point"):
        (dimension,) = walk.dims(a[name])
        walk.role(dimension, "qparam", node)
        out[a["axis"]] = walk.tie(out[a["axis"]], dimension, node)
    return [zero_or_unknown(d) for d in out]


@rule(
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d",
    "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d",
)  # fmt: skip
def pool(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Windows over the last axes; the others pass, and constants too unless they are averaged with padding."""
    rank = int(str(node.target).split("pool")[1][0])
    padded = "avg" in str(node.target) and any(a.get("padding", (0,)))
    out = _over_last(walk, node, walk.dims(a["self"]), rank, constant=not padded)
    if isinstance(node.meta["val"], torch.Tensor):
        return out
    indices = [d.like(rest=np.full(d.size, UNKNOWN)) if isinstance(d, Axis) else d for d in out]
    return [out, indices]


@rule(
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d.vec", "upsample_nearest1d.vec",
    "upsample_linear1d.vec", "upsample_nearest3d.vec", "upsample_trilinear3d.vec",
)  # fmt: skip
def resize(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Neighbours over the last axes; the others pass."""
    return _over_last(walk, node, walk.dims(a["input"]), node.meta["val"].dim() - 2)


def _over_last(
    walk: Walk, node: fx.Node, source: Dimensions, rank: int, constant: bool = False
) -> Dimensions:
    for dimension in source[-rank:]:
        walk.freeze(dimension, f"{node.name} slides over it")
    lead = source[:-rank]
    return [*(lead if constant else map(zero_or_unknown, lead)), *[Fixed()] * rank]


@rule("mean", "sum", "amax.default", "amin.default", "linalg_vector_norm.default", "mean.default")
def reduce(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Over pixels, channels pass. Over channels, a sum of zeros is exact; a mean or maximum is not, nor its count."""
    source = walk.dims(a["self"])
    over = {axis % len(source) for axis in a.get("dim") or range(len(source))}
    keep = a.get("keepdim", False)
    adds = ops.is_op(node, "sum") or ("vector_norm" in str(node.target) and a["ord"] > 0)
    out: Dimensions = []
    for axis, dimension in enumerate(source):
        if axis not in over:
            out.append(zero_or_unknown(dimension) if adds else dimension)
            continue
        if isinstance(dimension, Axis):
            if adds:
                walk.absorb(dimension, node)
            else:
                walk.freeze(dimension, f"{node.name} reduces over its channels")
        if keep:
            out.append(Fixed())
    return out


@rule("softmax", "log_softmax", "_softmax.default", "cumsum.default")
def along(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """One axis is normalised or accumulated and stays whole; rows of the others become values that are not known."""
    out = walk.dims(a["self"])
    axis = a["dim"]
    out[axis] = walk.freeze(out[axis], f"{node.name} mixes its channels")
    return [d.like(rest=np.full(d.size, UNKNOWN)) if isinstance(d, Axis) else d for d in out]


@rule("glu.default")
def glu(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``x[:c] * sigmoid(x[c:])``: the halves go together."""
    out = walk.dims(a["self"])
    axis = a["dim"]
    dimension = out[axis]
    if isinstance(dimension, Axis):
        half = dimension.size // 2
        walk.labels.tie(dimension.ids[:half], dimension.ids[half:])
        rest = np.where(dimension.rest[:half] == 0, 0.0, UNKNOWN)
        out[axis] = dimension.like(dimension.ids[:half], rest)
    return [zero_or_unknown(d) for d in out]
