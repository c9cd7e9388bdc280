"""Weights as the kernels read them, zero points in the bias: ``sum (x - z) * w + b = sum x * w + (b - z * sum w)``."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.cuda.conv_plan import GROUP, ConvPlan

Array = np.ndarray[Any, Any]


def shifted_bias(weight: Array, bias: Array, zero_point: int) -> Array:
    """``b - z * sum w`` modulo 2**32, in which the sum of products is taken: the result is the definition's."""
    sums = weight.reshape(len(weight), -1).astype(np.int64).sum(1)
    shifted: Array = (bias.astype(np.int64) - zero_point * sums).astype(np.uint32).view(np.int32)
    return shifted


def padded(values: Array, size: int) -> Array:
    """``values`` and zeros behind them."""
    result = np.zeros(size, values.dtype)
    result[: len(values)] = values
    return result


def channel_constants(
    plan: ConvPlan, weight: Array, bias: Array, multiplier: Array
) -> tuple[Array, Array]:
    """What an integer layer's epilogue reads of every output channel, of whole tiles: the shifted bias and the multiplier."""
    shifted = shifted_bias(weight, bias, plan.workload.x_zero_point)
    return padded(shifted, plan.padded_channels), padded(multiplier, plan.padded_channels)


def float_bias(plan: ConvPlan, bias: Array | None) -> Array:
    """The bias of a float layer as float32, of whole tiles; zeros where there is none."""
    values = np.zeros(0, np.float32) if bias is None else bias.astype(np.float32)
    return padded(values, plan.padded_channels)


def _tiled(plan: ConvPlan, weight: Array) -> Array:
    """Weight OIHW as ``[column tile][step][column][STEP bytes]`` (k = tap, channel), zeros where there is none."""
    out, channels, height, width = weight.shape
    taps = np.zeros((plan.padded_channels, height, width, plan.tap_channels), weight.dtype)
    taps[:out, :, :, :channels] = weight.transpose(0, 2, 3, 1)
    rows = np.zeros((plan.padded_channels, plan.steps * plan.step_elements), weight.dtype)
    rows[:, : plan.depth] = taps.reshape(plan.padded_channels, -1)
    shape = (plan.column_tiles, plan.tile.columns, plan.steps, plan.step_elements)
    return np.ascontiguousarray(rows.reshape(shape).transpose(0, 2, 1, 3)).reshape(-1)


def pack_conv(plan: ConvPlan, weight: Array, bias: Array, multiplier: Array) -> list[Array]:
    """int8 weight OIHW as ``conv`` reads it, bias and multiplier of whole tiles."""
    return [_tiled(plan, weight), *channel_constants(plan, weight, bias, multiplier)]


def round_tf32(values: Array) -> Array:
    """float32 to tf32: the low 13 bits of 23 are dropped, to nearest, ties away from zero. NaN and infinities stay."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    result: Array = np.where(np.isfinite(values), rounded.view(np.float32), values)
    return result


def pack_float_conv(plan: ConvPlan, weight: Array, bias: Array | None) -> list[Array]:
    """float32 weight OIHW as ``conv`` reads it, rounded to the plan's product, and the float32 bias of whole tiles."""
    rounded = round_tf32(weight) if plan.product.rounds else weight.astype(plan.product.weight)
    return [_tiled(plan, rounded), float_bias(plan, bias)]


def pack_dot(
    weight: Array, bias: Array, multiplier: Array, zero_point: int, groups: int
) -> list[Array]:
    """Weight OIHW as ``[group][tap][4 channels][output][4]`` for ``dp4a``, a group's channels in whole fours."""
    out, channels, height, width = weight.shape
    quads = -(-channels // GROUP)
    taps = np.zeros((groups, out // groups, height * width, quads * GROUP), np.int8)
    taps[..., :channels] = weight.reshape(groups, out // groups, channels, -1).swapaxes(2, 3)
    split = taps.reshape(groups, out // groups, height * width, quads, GROUP)
    packed = np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4)).view(np.int32).reshape(-1)
    return [packed, shifted_bias(weight, bias, zero_point), multiplier]


def pack_depthwise(weight: Array, bias: Array, multiplier: Array, zero_point: int) -> list[Array]:
    """Weight C1HW as ``[tap][channel]``, channels in whole fours."""
    channels = len(weight)
    size = -(-channels // GROUP) * GROUP
    taps = np.zeros((weight[0].size, size), np.int8)
    taps[:, :channels] = weight.reshape(channels, -1).T
    shifted = shifted_bias(weight, bias, zero_point)
    return [taps.reshape(-1), padded(shifted, size), padded(multiplier, size)]
