"""Weights in the order the micro-kernel reads them: ``[group][block][step][vector][half][lane][channel of the half]``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.conv_plan import ConvChoice, ConvPlan, plan_conv2d
from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.workload import Conv2d
from graphopt.errors import CompileError

Array = npt.NDArray[np.generic]


def _windows(workload: Conv2d, plan: ConvPlan, weight: Array) -> Array:
    """``[groups, out, window rows x spans, span]``: merged groups block-diagonal, pad channels zero."""
    kh, kw = workload.kernel
    merge = workload.groups // plan.groups
    in_one, out_one = plan.in_channels // merge, plan.out_channels // merge
    ohwi = weight.reshape(plan.groups, merge, out_one, in_one, kh, kw).transpose(0, 1, 2, 4, 5, 3)
    pitch = workload.x.channel_stride if plan.merged_columns else plan.steps * plan.step
    dense = np.zeros((plan.groups, merge, out_one, kh, kw, pitch), weight.dtype)
    for i in range(merge):
        dense[:, i, ..., i * in_one : (i + 1) * in_one] = ohwi[:, i]
    dense = dense.reshape(plan.groups, plan.out_channels, kh, kw, pitch)
    if plan.merged_columns:
        return dense.reshape(plan.groups, plan.out_channels, kh, kw * pitch)[..., : plan.span]
    return dense.reshape(plan.groups, plan.out_channels, kh * kw, pitch)


def _pack_weight(workload: Conv2d, plan: ConvPlan, weight: Array) -> Array:
    """The flat packed weight."""
    windows = _windows(workload, plan, weight)
    depth = plan.steps * plan.step
    size = (plan.groups, plan.group_vectors * plan.lanes, windows.shape[2], depth)
    padded = np.zeros(size, weight.dtype)
    padded[:, : windows.shape[1], :, : windows.shape[3]] = windows
    groups, vectors, lanes = plan.groups, plan.group_vectors, plan.lanes
    split = padded.reshape(groups, vectors, lanes, plan.all_steps, plan.step)
    split = split.transpose(0, 1, 3, 2, 4)  # group, vector, step, lane, channel
    halves = plan.isa.half_channels if weight.dtype == np.int8 else ((0,),)
    ordered = np.stack([split[..., channels] for channels in halves], axis=3)
    ordered = ordered.reshape(groups, vectors, plan.all_steps, plan.step_elements)
    blocks = [
        ordered[:, first : first + plan.vectors].transpose(0, 2, 1, 3).reshape(groups, -1)
        for first in range(0, vectors, plan.vectors)
    ]
    return np.ascontiguousarray(np.concatenate(blocks, axis=1).reshape(-1))


def _flipped_sums(
    workload: Conv2d, plan: ConvPlan, isa: Isa, weight: Array
) -> npt.NDArray[np.int32]:
    """``sum(flip * weight)`` of each output channel: what the products with ``x - flip`` leave out."""
    windows = _windows(workload, plan, weight).astype(np.int32)
    channel = np.arange(windows.shape[-1]) % INT8_STEP
    left_out = windows * np.array(isa.flips, np.int32)[channel]
    sums: npt.NDArray[np.int32] = left_out.sum(axis=(2, 3), dtype=np.int32)
    return sums.reshape(-1)


def _pack_channels(plan: ConvPlan, values: Array) -> Array:
    """One value an output channel, padded with zeros to whole vectors of every group."""
    packed = np.zeros((plan.groups, plan.group_vectors * plan.lanes), values.dtype)
    packed[:, : plan.out_channels] = values.reshape(plan.groups, plan.out_channels)
    return packed.reshape(-1)


def pack_conv2d(
    workload: Conv2d,
    isa: Isa,
    weight: Array,
    bias: Array | None,
    multiplier: Array | None,
    choice: ConvChoice | None = None,
) -> list[Array]:
    """The kernel's constant arguments in order: packed weight, bias, and for uint8 activations the multiplier.

    ``weight`` is OIHW (int8 or float32), ``bias`` [O] (int32 or float32, None for zeros), ``multiplier`` float32 [O].
    The bias is ``folded_bias``.
    """
    plan = plan_conv2d(workload, isa, choice)
    o, i = workload.y.channels, workload.x.channels // workload.groups
    if weight.shape != (o, i, *workload.kernel):
        raise CompileError(
            f"conv2d weight has shape {weight.shape}, its workload says {(o, i, *workload.kernel)}; pass OIHW"
        )
    if workload.x.dtype == "float32":
        weight = weight.astype(np.float32, copy=False)
        start = folded_bias(workload, weight, bias)
        return [_pack_weight(workload, plan, weight), _pack_channels(plan, start)]
    if weight.dtype != np.int8:
        raise CompileError(
            f"conv2d on uint8 activations takes an int8 weight, not {weight.dtype}; quantize it"
        )
    if multiplier is None:
        raise CompileError(
            "conv2d on uint8 activations takes a multiplier for each output channel; pass one"
        )
    start = folded_bias(workload, weight, bias)
    if any(isa.flips):
        start = start.astype(np.int32) + _flipped_sums(workload, plan, isa, weight)
    return [
        _pack_weight(workload, plan, weight),
        _pack_channels(plan, start),
        _pack_channels(plan, multiplier.astype(np.float32, copy=False)),
    ]
