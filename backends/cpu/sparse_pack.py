"""Sparse weights: the blocks that hold a non-zero, row by row of output channels, and where each one's tap is.

A block is 4 int8 of neighbouring input channels, or 1 float32. Stored are its 32 bits and, in 16, where its tap reads: of a
layer with 10 % of its blocks 15 % of the dense bytes of either element type.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.sparse_plan import SparsePlan
from graphopt.backends.cpu.sparse_products import AHEAD
from graphopt.backends.cpu.workload import PLANE_BYTES

Array = npt.NDArray[np.generic]


def blocks(weight: Array) -> Array:
    """An OIHW weight as ``[O, taps, 4 or 1]``, taps in the order plane, row, column; pad channels are zeros."""
    out_channels, in_channels, kh, kw = weight.shape
    group = 1 if weight.dtype == np.float32 else PLANE_BYTES
    planes = -(-in_channels // group)
    padded = np.zeros((out_channels, planes * group, kh, kw), weight.dtype)
    padded[:, :in_channels] = weight
    split = padded.reshape(out_channels, planes, group, kh, kw).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(split.reshape(out_channels, planes * kh * kw, group))


def density(weight: Array) -> float:
    """The share of blocks that a sparse kernel multiplies by."""
    return float(np.any(blocks(weight), axis=-1).mean())


def _parted(filled: Array, plan: SparsePlan) -> Array:
    """Which taps each row has, part by part: the rows of all parts one after the other, pad channels with them."""
    parted = np.zeros((plan.parts, plan.rows, filled.shape[1]), bool)
    size = plan.part_planes * (filled.shape[1] // plan.workload.x.planes)
    for part in range(plan.parts):
        taps = slice(part * size, (part + 1) * size)
        parted[part, : filled.shape[0], taps] = filled[:, taps]
    return parted.reshape(plan.parts * plan.rows, -1)


def _zigzag(filled: Array) -> tuple[Array, Array]:
    """Rows and taps of the blocks; every other row backwards: it begins with the pixels that the row before left in L1."""
    rows, taps = np.nonzero(filled)
    order = np.lexsort((np.where(rows % 2 == 1, -taps, taps), rows))
    return rows[order], taps[order]


def pack_sparse(
    plan: SparsePlan,
    weight: Array,
    bias: Array | None,
    multiplier: Array | None,
    flips: tuple[int, ...] = (0,) * PLANE_BYTES,
) -> list[Array]:
    """The kernel's constants in order: values, bias, for uint8 activations the multiplier, taps, starts of rows.

    ``weight`` is OIHW (int8 or float32), ``bias`` [O] (int32 or float32, None for zeros), ``multiplier`` float32 [O]. The
    bias takes what the row's ``flips`` leave out. Taps are read a word ahead: there are ``AHEAD`` more than blocks.
    """
    workload = plan.workload
    dtype = np.float32 if workload.x.dtype == "float32" else np.int32
    weight = weight.astype(np.float32 if dtype == np.float32 else np.int8, copy=False)
    cut = blocks(weight)
    filled = np.any(cut, axis=-1)
    rows, taps = _zigzag(_parted(filled, plan))
    size = max(1, rows.size)  # no tensor is empty
    values, index = np.zeros(size, dtype), np.zeros(size + AHEAD, np.uint16)
    chosen = np.ascontiguousarray(cut[rows % plan.rows, taps])
    values[: rows.size] = chosen.view(dtype).reshape(-1)
    index[: taps.size] = np.array(plan.offsets())[taps] // plan.unit
    counts = np.bincount(rows, minlength=plan.parts * plan.rows)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)

    def per_row(source: Array) -> Array:
        padded = np.zeros(plan.rows, source.dtype)
        padded[: source.size] = source
        return padded

    start = folded_bias(workload, weight, bias)
    if any(flips) and dtype == np.int32:
        start = start + (cut.astype(np.int32) * np.array(flips, np.int32)).sum(axis=(1, 2))
    constants = [values, per_row(start.astype(dtype, copy=False))]
    if multiplier is not None:
        constants.append(per_row(multiplier.astype(np.float32, copy=False)))
    return [*constants, index, starts]
