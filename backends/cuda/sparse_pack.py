"""Weights pruned 2:4 as ``mma.sp`` takes them: of every four neighbours in k two values and where they were.

``k = (tap row, tap column, channel)`` with the channels of a tap in whole fours, so that a group of four is four neighbouring
input channels of one tap: what ``Prune(granularity="n-m")`` prunes. A group with fewer than two nonzeros keeps zeros.

A fragment is 16 output channels x 64 of k for one warp. Of lane ``4 g + t``, registers ``n`` = 0..3 hold the kept bytes
``4 t + 16 (n / 2) ..`` of row ``g + 8 (n % 2)``; its word of metadata is that of row ``g + 8 (t % 2)``, ``k = 32 (t / 2) ..``, four
bits a group from the lowest on: the first index, then the second, which is greater. Sources: PTX ISA, "Sparse matrix
storage" and "Matrix fragments for sparse mma.m16n8k64"; CUTLASS, which orders metadata in the same way in ``host_reorder.h``,
in ``ELayout`` of ``mma_traits_sm120_sparse.hpp`` and in what it tests on GPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.cuda.conv_pack import padded, shifted_bias
from graphopt.backends.cuda.conv_plan import GROUP, STEP, ConvPlan

Array = np.ndarray[Any, Any]

KEPT = 2  # of a group
ROWS = 16  # output channels of a fragment
_LANES = 32
WEIGHT_BYTES = ROWS * STEP * KEPT // GROUP
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
    """Of int8 ``[O, K]`` the kept values ``[O, K / 2]`` and the metadata ``[O, K / 32]`` as uint32, lowest bits first.

    No group of four may have more than two nonzeros; K is a multiple of 32.
    """
    groups = rows.reshape(len(rows), -1, GROUP)
    # nonzeros first, then zeros, either in their order; of these the first two, in the order of k
    kept = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :KEPT], axis=-1)
    values = np.take_along_axis(groups, kept, -1).reshape(len(rows), -1)
    nibbles = (kept[..., 0] | kept[..., 1] << 2).reshape(len(rows), -1, 8).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return values, words


def _fragments(values: Array, words: Array) -> Array:
    """``[16-channel block][step][FRAGMENT_BYTES]``: every lane's registers, then every lane's metadata."""
    blocks = len(values) // ROWS
    # row = half, g; kept byte of a step = pair, t, byte; lane = g, t; register = pair, half
    registers = values.reshape(blocks, 2, 8, -1, 2, 4, 4).transpose(0, 3, 2, 5, 4, 1, 6)
    # half of k = pair; lane = g, pair, half
    metadata = words.reshape(blocks, 2, 8, -1, 2).transpose(0, 3, 2, 4, 1)
    parts = [
        np.ascontiguousarray(part).reshape(blocks, metadata.shape[1], -1)
        for part in (registers, metadata.astype("<u4"))
    ]
    return np.concatenate([parts[0].view(np.int8), parts[1].view(np.int8)], axis=-1)


def pack_sparse(plan: ConvPlan, weight: Array, bias: Array, multiplier: Array) -> list[Array]:
    """Weight OIHW as ``[column tile][step][16-channel block][FRAGMENT_BYTES]``, bias and multiplier of whole tiles."""
    rows = np.zeros((plan.padded_channels, plan.steps * STEP), np.int8)
    rows[: len(weight), : plan.depth] = _in_groups(weight).reshape(len(weight), -1)
    fragments = _fragments(*compress(rows))
    tiled = fragments.reshape(plan.column_tiles, -1, plan.steps, FRAGMENT_BYTES).swapaxes(1, 2)
    shifted = shifted_bias(weight, bias, plan.workload.x_zero_point)
    return [
        np.ascontiguousarray(tiled).reshape(-1),
        padded(shifted, plan.padded_channels),
        padded(multiplier, plan.padded_channels),
    ]
