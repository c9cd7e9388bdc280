"""Weights pruned 2:4 as ``mma.sp`` takes them: of every four neighbours in k two values and where they were.

``k = (tap row, tap column, channel)`` with the channels of a tap in whole fours, so that a group of four is four neighbouring
input channels of one tap: what ``Prune(granularity="n-m")`` prunes. A group with fewer than two nonzeros keeps zeros.

A fragment is 16 output channels x 64 bytes of k for one warp, 32 of them kept. Of lane ``4 g + t``, registers ``n`` = 0..3 hold
the kept bytes ``4 t + 16 (n / 2) ..`` of row ``g + 8 (n % 2)``. Metadata are four bits a group from the lowest on: the first
index, then the second, which is greater. A lane's word is, of int8, that of row ``g + 8 (t % 2)``, ``k = 32 (t / 2) ..``; of
float16, for t = 0 and 1 alone, 16 bits of row g and 16 of row ``g + 8``, both from ``k = 16 t`` on. Sources: PTX ISA, "Sparse
matrix storage" and "Matrix fragments for sparse mma.m16n8k32" and ``m16n8k64``; CUTLASS, which orders metadata in the same
way in ``host_reorder.h`` and in ``ELayout`` of ``mma_traits_sm120_sparse.hpp``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.cuda.conv_pack import channel_constants, float_bias
from graphopt.backends.cuda.conv_plan import GROUP, STEP, ConvPlan

Array = np.ndarray[Any, Any]

KEPT = 2  # of a group
ROWS = 16  # output channels of a fragment
_LANES = 32
WEIGHT_BYTES = ROWS * STEP * KEPT // GROUP  # of a fragment, in the lanes' registers
FRAGMENT_BYTES = WEIGHT_BYTES + 4 * _LANES  # with a word of metadata a lane


def _in_groups(weight: Array) -> Array:
    """OIHW as ``[O, H, W, I / 4, 4]``, zeros behind the last channel."""
    missing = -weight.shape[1] % GROUP
    whole = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 3, 1)
    return whole.reshape(*whole.shape[:3], -1, GROUP)


def is_two_of_four(weight: Array) -> bool:
    """True where no group of four neighbouring input channels at one tap has more than two nonzeros (weight OIHW)."""
    return bool((np.count_nonzero(_in_groups(weight), axis=-1) <= KEPT).all())


def compress(rows: Array) -> tuple[Array, Array]:
    """Of ``[O, K]`` the kept values ``[O, K / 2]`` and the metadata ``[O, K / 32]`` as uint32, lowest bits first.

    No group of four may have more than two nonzeros; K is a multiple of 32.
    """
    groups = rows.reshape(len(rows), -1, GROUP)
    # nonzeros first, then zeros, either in their order; of these the first two, in the order of k
    kept = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :KEPT], axis=-1)
    values = np.take_along_axis(groups, kept, -1).reshape(len(rows), -1)
    nibbles = (kept[..., 0] | kept[..., 1] << 2).reshape(len(rows), -1, 8).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return values, words


def _lane_words(words: Array, item_bytes: int) -> Array:
    """Metadata ``[16-channel block][half of the rows][g][words]`` as ``[block][step][g][t]``."""
    if item_bytes == 1:  # half of k = pair; t = pair, half
        pairs = words.reshape(*words.shape[:3], -1, 2)
        return pairs.transpose(0, 3, 2, 4, 1).reshape(len(words), pairs.shape[3], 8, 4)
    half = np.uint32(16)
    lower, upper = words[:, 0], words[:, 1]
    first = lower & np.uint32(0xFFFF) | upper << half
    second = lower >> half | upper & np.uint32(0xFFFF0000)
    unread = np.zeros_like(first)
    return np.stack([first, second, unread, unread], axis=-1).swapaxes(1, 2)


def _fragments(values: Array, words: Array) -> Array:
    """``[16-channel block][step][FRAGMENT_BYTES]``: every lane's registers, then every lane's metadata."""
    blocks = len(values) // ROWS
    # row = half, g; kept byte of a step = pair, t, byte; lane = g, t; register = pair, half
    kept = np.ascontiguousarray(values).view(np.int8).reshape(blocks, 2, 8, -1, 2, 4, 4)
    registers = np.ascontiguousarray(kept.transpose(0, 3, 2, 5, 4, 1, 6))
    metadata = _lane_words(words.reshape(blocks, 2, 8, -1), values.dtype.itemsize)
    parts = [
        registers.reshape(blocks, -1, WEIGHT_BYTES),
        np.ascontiguousarray(metadata, "<u4").view(np.int8).reshape(blocks, -1, 4 * _LANES),
    ]
    return np.concatenate(parts, axis=-1)


def _tiled(plan: ConvPlan, weight: Array) -> Array:
    """Weight OIHW as ``[column tile][step][16-channel block][FRAGMENT_BYTES]``, in elements of the weight's type."""
    rows = np.zeros((plan.padded_channels, plan.steps * plan.step_elements), weight.dtype)
    rows[: len(weight), : plan.depth] = _in_groups(weight).reshape(len(weight), -1)
    fragments = _fragments(*compress(rows))
    tiled = fragments.reshape(plan.column_tiles, -1, plan.steps, FRAGMENT_BYTES).swapaxes(1, 2)
    return np.ascontiguousarray(tiled).reshape(-1).view(weight.dtype)


def pack_sparse(plan: ConvPlan, weight: Array, bias: Array, multiplier: Array) -> list[Array]:
    """int8 weight OIHW as ``sparse_conv`` reads it, bias and multiplier of whole tiles."""
    return [_tiled(plan, weight), *channel_constants(plan, weight, bias, multiplier)]


def pack_sparse_float(plan: ConvPlan, weight: Array, bias: Array | None) -> list[Array]:
    """float32 weight OIHW, rounded to float16, as ``sparse_conv`` reads it, and the float32 bias of whole tiles."""
    return [_tiled(plan, weight.astype(plan.product.weight)), float_bias(plan, bias)]
