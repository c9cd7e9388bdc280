"""What layers do to channels: convolutions, linear layers, products of matrices, attention, norms, embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt import ops
from graphopt.arrays import to_numpy
from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed, Rest
from graphopt.passes.prune.channels.walk import Walk, rule

Answer = Dimensions | list[Dimensions]


def _layer(walk: Walk, node: fx.Node, out: Dimension, weight: Dimension, bias: Any) -> Dimension:
    """A layer's output channels: those of its weight and bias, zero where both are."""
    walk.role(weight, "output", node)
    parts = [weight]
    if bias is not None:
        (shift,) = walk.dims(bias)
        walk.role(shift, "bias", node)
        parts.append(shift)
        out = walk.tie(out, shift, node)
    walk.layers[node] = out
    if not isinstance(out, Axis):
        return out
    if all(isinstance(part, Axis) and part.is_zero for part in parts):
        return out.like()
    return out.like(rest=np.full(out.size, UNKNOWN))


def _reads(walk: Walk, node: fx.Node, source: Dimension, weight: Dimension, foldable: bool) -> None:
    """A layer's input channels: the weight's columns go with them."""
    walk.role(weight, "input", node)
    tied = walk.tie(source, weight, node)
    if isinstance(tied, Axis) and isinstance(source, Axis):
        walk.absorb(source, node, foldable)
        walk.sources.setdefault(node, []).append(source.ids)


@rule("linear")
def linear(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``y[..., o] = sum_i W[o, i] x[..., i] + b[o]``: leading axes pass."""
    source, weight = walk.dims(a["input"]), walk.dims(a["weight"])
    if not walk.is_constant(a["weight"]) or len(weight) != 2:
        return walk.give_up(node, f"the weight of {node.name} is computed from activations")
    _reads(walk, node, source[-1], weight[1], _takes_constants(walk, a))
    lead = [_carried(d, a["bias"] is None) for d in source[:-1]]
    return [*lead, _layer(walk, node, weight[0], weight[0], a["bias"])]


def _takes_constants(walk: Walk, a: dict[str, Any]) -> bool:
    """True where a constant input channel can move into the bias: no padding, and parameters that are plain."""
    parameters = [v for v in (a["weight"], a["bias"]) if v is not None]
    plain = all(v.op == "get_attr" and walk.uses[str(v.target)] == 1 for v in parameters)
    return plain and not any(a.get("padding", (0,)))


def _carried(dimension: Dimension, zero_stays: bool) -> Dimension:
    """An axis beside the one that a layer sums over: zero rows stay zero where no bias is added."""
    if not isinstance(dimension, Axis) or (zero_stays and dimension.is_zero):
        return dimension
    rest = np.where((dimension.rest == 0) & zero_stays, 0.0, UNKNOWN)
    return dimension.like(rest=rest)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Dense: input channels with columns, output channels with rows. Grouped: see ``_grouped``."""
    op = ops.info(node)
    assert op is not None
    source, weight = walk.dims(a["input"]), walk.dims(a["weight"])
    if not walk.is_constant(a["weight"]):
        return walk.give_up(node, f"the weight of {node.name} is computed from activations")
    spatial = len(weight) - 2
    at = len(source) - spatial - 1
    for dimension in (*weight[2:], *source[at + 1 :]):
        walk.freeze(dimension, f"{node.name} slides over it")
    if a["groups"] == 1:
        foldable = op.kind == "convolution" and _takes_constants(walk, a)
        _reads(walk, node, source[at], weight[op.in_channels], foldable)
        out = _layer(walk, node, weight[op.out_channels], weight[op.out_channels], a["bias"])
    elif op.kind == "convolution":
        out = _grouped(walk, node, source[at], weight, a)
    else:
        out = _grouped_transposed(walk, node, source[at], weight, a)
    lead = [_carried(d, a["bias"] is None) for d in source[:at]]
    return [*lead, out, *[Fixed()] * spatial]


def _grouped(
    walk: Walk, node: fx.Node, source: Dimension, weight: Dimensions, a: dict[str, Any]
) -> Dimension:
    """Group i of outputs reads group i of inputs.

    A group of one input or one output (depthwise) goes as a whole. Otherwise inputs and outputs are free of each other,
    equally many of each group: row block i of the weight loses the columns of its own group.
    """
    groups = int(a["groups"])
    rows, columns = weight[0], weight[1]
    inputs = a["weight"].meta["val"].shape[1]
    if not isinstance(rows, Axis):
        walk.freeze(source, rows.reason or f"{node.name} has a single output")
        return _layer(walk, node, rows, rows, a["bias"])
    outputs = rows.size // groups
    if inputs == 1 or outputs == 1:
        walk.freeze(columns, f"{node.name} is grouped")
        _tie_whole_groups(walk, node, source, rows, groups)
        out: Dimension = rows if isinstance(source, Axis) else Fixed(source.reason)
        return _layer(walk, node, out, rows, a["bias"])
    if isinstance(source, Axis):
        reason = _take_columns(walk, node, source, columns, a["weight"], groups)
        if reason is not None:
            walk.freeze(source, reason)
            walk.freeze(columns, reason)
        else:
            walk.sources.setdefault(node, []).append(source.ids)
    else:
        walk.freeze(columns, source.reason or f"{node.name} is grouped")
    walk.labels.balance(rows.ids, groups, node.name)
    return _layer(walk, node, rows, rows, a["bias"])


def _tie_whole_groups(
    walk: Walk, node: fx.Node, source: Dimension, rows: Axis, groups: int
) -> None:
    if not isinstance(source, Axis):
        walk.freeze(rows, source.reason or f"{node.name} reads channels that are fixed")
        return
    if rows.size == groups == source.size and not rows.is_named:
        rows.adopt(source.ids)  # depthwise, the frequent case: no tie needed
        walk.sources.setdefault(node, []).append(source.ids)
        return
    blocks = np.concatenate([rows.ids.reshape(groups, -1), source.ids.reshape(groups, -1)], axis=1)
    walk.labels.tie(blocks[:, 1:].ravel(), np.repeat(blocks[:, 0], blocks.shape[1] - 1))
    walk.sources.setdefault(node, []).append(source.ids)


def _take_columns(
    walk: Walk, node: fx.Node, source: Axis, columns: Dimension, weight: fx.Node, groups: int
) -> str | None:
    """Note which columns each group of rows has; else the reason why they cannot be taken one by one."""
    if not isinstance(columns, Axis):
        return columns.reason or f"the weight of {node.name} is computed"
    shape = weight.meta["val"].shape
    for name, axis in columns.slots:
        reader = walk.readers[name]
        shared = walk.uses[name] > 1 or len(weight.users) > 1
        if shared or axis != 1 or reader.meta["val"].shape != shape:
            return f"the weight of {node.name}, which is grouped, is shared or computed"
    walk.absorb(source, node)
    walk.role(columns, "input", node)
    walk.freeze(columns, f"{node.name} is grouped")  # its own labels mean nothing
    for name, _ in columns.slots:
        walk.per_group[name] = source.ids.reshape(groups, -1)
    walk.labels.balance(source.ids, groups, node.name)
    return None


def _grouped_transposed(
    walk: Walk, node: fx.Node, source: Dimension, weight: Dimensions, a: dict[str, Any]
) -> Dimension:
    """Weight ``[in, out / groups, ...]``: whole groups where each has one input and one output, else frozen."""
    groups = int(a["groups"])
    rows, columns = weight[0], weight[1]
    outputs = a["weight"].meta["val"].shape[1]
    if isinstance(rows, Axis) and rows.size == groups and outputs == 1:
        _tie_whole_groups(walk, node, source, rows, groups)
        out: Dimension = rows if isinstance(source, Axis) else Fixed(source.reason)
        return _layer(walk, node, out, rows, a["bias"])
    reason = f"{node.name} is transposed and grouped"
    for dimension in (source, rows, columns):
        walk.freeze(dimension, reason)
    if a["bias"] is not None:
        walk.freeze(walk.dims(a["bias"])[0], reason)
    walk.layers[node] = Fixed(reason)
    return Fixed(reason)


@rule("embedding")
def embedding(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Rows of a table: the table's columns are the channels."""
    rows, columns = walk.dims(a["weight"])
    if not walk.is_constant(a["weight"]):
        return walk.give_up(node)
    walk.freeze(rows, f"{node.name} looks rows up")
    out = _layer(walk, node, columns, columns, None)
    return [*[Fixed()] * (node.meta["val"].dim() - 1), out]


@rule("batch_norm", "instance_norm")
def norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """A scale, a shift and two statistics a channel; zero after a zero scale and shift, whatever came in."""
    source = walk.dims(a["input"])
    channels = source[1]
    roles = {"weight": "scale", "bias": "shift", "running_mean": "statistic"}
    roles["running_var"] = "statistic"
    for argument, role in roles.items():
        if a[argument] is not None:
            (dimension,) = walk.dims(a[argument])
            walk.role(dimension, role, node)
            channels = walk.tie(channels, dimension, node)
    others = [source[0], *source[2:]]
    batch, *pixels = (_beside_norm(walk, node, d, _from_batch(a)) for d in others)
    return [batch, _normed(walk, node, channels, source[1], a), *pixels]


def _from_batch(a: dict[str, Any]) -> bool:
    """True where the statistics are those of the values themselves."""
    return bool(a.get("training", a.get("use_input_stats")))


def _beside_norm(walk: Walk, node: fx.Node, dimension: Dimension, from_batch: bool) -> Dimension:
    """An axis beside the norm's channels: part of its statistics, or shifted."""
    if from_batch:
        return walk.freeze(dimension, f"{node.name} takes statistics over it")
    return _carried(dimension, False)


def _normed(
    walk: Walk, node: fx.Node, channels: Dimension, source: Dimension, a: dict[str, Any]
) -> Dimension:
    if not isinstance(channels, Axis):
        return channels
    if _is_zeroed(walk, a):
        return channels.like()
    rest = source.rest if isinstance(source, Axis) else np.full(channels.size, UNKNOWN)
    return channels.like(rest=_normalised(walk, rest, a))


def _is_zeroed(walk: Walk, a: dict[str, Any]) -> bool:
    """True where the masked network's scale and shift are zero."""
    parts = [walk.dims(a[name])[0] for name in ("weight", "bias") if a[name] is not None]
    return a["weight"] is not None and all(isinstance(d, Axis) and d.is_zero for d in parts)


def _normalised(walk: Walk, rest: Rest, a: dict[str, Any]) -> Rest:
    """A constant channel normalised without a scale: zero by its own statistics, a constant by running ones."""
    if a["bias"] is not None:
        return np.full_like(rest, UNKNOWN)
    if _from_batch(a):
        return np.where(np.isfinite(rest), 0.0, UNKNOWN)
    if a["running_mean"].op != "get_attr" or a["running_var"].op != "get_attr":
        return np.full_like(rest, UNKNOWN)
    mean, variance = (
        walk.program.tensor(a[name]).detach().cpu() for name in ("running_mean", "running_var")
    )
    value = torch.nn.functional.batch_norm(
        torch.as_tensor(rest, dtype=mean.dtype)[None],
        mean,
        variance,
        eps=a["eps"],
    )
    return to_numpy(value[0].double())


@rule("group_norm")
def group_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Statistics over a group of channels: whole groups go together."""
    source = walk.dims(a["input"])
    channels = source[1]
    for argument, role in (("weight", "scale"), ("bias", "shift")):
        if a[argument] is not None:
            (dimension,) = walk.dims(a[argument])
            walk.role(dimension, role, node)
            channels = walk.tie(channels, dimension, node)
    if isinstance(channels, Axis):
        blocks = channels.ids.reshape(int(a["num_groups"]), -1)
        walk.labels.tie(blocks[:, 1:].ravel(), np.repeat(blocks[:, 0], blocks.shape[1] - 1))
        is_zero = isinstance(source[1], Axis) and source[1].is_zero and a["bias"] is None
        is_zero = is_zero or _is_zeroed(walk, a)
        channels = channels.like(rest=None if is_zero else np.full(channels.size, UNKNOWN))
    pixels = [walk.freeze(d, f"{node.name} takes statistics over it") for d in source[2:]]
    return [_carried(source[0], a["bias"] is None), channels, *pixels]


@rule("layer_norm", "rms_norm.default")
def layer_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Statistics over the last axes, which therefore stay whole; the others pass."""
    source = walk.dims(a["input"])
    kept = len(source) - len(a["normalized_shape"])
    reason = f"{node.name} normalises over its channels"
    for dimension in source[kept:]:
        walk.freeze(dimension, reason)
    for argument in ("weight", "bias"):
        if a.get(argument) is not None:
            for dimension in walk.dims(a[argument]):
                walk.freeze(dimension, reason)
    lead = [_carried(d, a.get("bias") is None) for d in source[:kept]]
    return [*lead, *[Fixed(reason)] * (len(source) - kept)]


@rule("prelu.default")
def prelu(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``max(x, 0) + w * min(x, 0)``: one slope, or one a channel (axis 1)."""
    source = walk.dims(a["self"])
    (slope,) = walk.dims(a["weight"])
    if a["weight"].meta["val"].numel() > 1:
        walk.role(slope, "factor", node)
        source[1] = walk.tie(source[1], slope, node)
    return [_carried(d, True) for d in source]
