"""What the device functions of sparse products mean, on lanes: ``mma.sp::ordered_metadata.m16n8`` by the PTX ISA.

A is 16 x 64 bytes with two of every four neighbours of a row kept, so 16 x 32 bytes in registers; B is 64 bytes x 8. Of lane ``4 g + t``,
register n holds of A the bytes ``4 t + 16 (n / 2) ..`` of row ``g + 8 (n % 2)``, of B the bytes ``4 t + 16 n ..`` of column g.
Metadata are four bits a group of four, the lower index in the lower two. Of bytes (k64) they are those of row ``g + 8 (t % 2)``,
columns ``32 (t / 2) ..``; of float16 (k32, selector 0), where t is 0 or 1, of rows g and ``g + 8``, columns ``16 t ..``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_WARP, _REGISTERS = 32, 4
_TYPES = {"u8": ("int8", "uint8"), "s8": ("int8", "int8"), "f16": ("float16", "float16")}
ORDERED = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)  # any other four bits are undefined


def _register(pointer: Any, index: int) -> Any:
    return type(pointer)(pointer.storage, pointer.byte + 4 * index)


def _load(grid: Any, pointer: Any, dtype: str) -> Array:
    """Four registers of the running warps, ``[warps, lanes, register, element]``."""
    words = [grid.read(_register(pointer, i), 4) for i in range(_REGISTERS)]
    whole = np.ascontiguousarray(np.stack(words, axis=1)).view(dtype)
    return whole.reshape(-1, _WARP, *whole.shape[1:])


def expand(kept: Array, words: Array) -> Array:
    """A ``[warps, 16, 64 or 32]`` of its registers ``[warps, 32, 4, 4 or 2]`` and metadata ``[warps, 32]``."""
    many = kept.shape[-1]  # elements of a register
    row, column = np.divmod(np.arange(16 * 8 * many), 8 * many)  # of every kept element
    g, group = row % 8, column // 2
    if many == 4:
        holder, first_bit = 4 * g + row // 8 + 2 * (group // 8), 4 * (group % 8)
    else:
        holder, first_bit = 4 * g + group // 4, 4 * (group % 4) + 16 * (row // 8)
    codes = words[:, holder] >> first_bit.astype(np.uint32) & np.uint32(15)
    assert np.isin(codes, ORDERED).all(), "metadata that is undefined"
    where = 4 * group + (codes >> (2 * (column % 2)).astype(np.uint32) & np.uint32(3)).astype(int)
    lane, register = 4 * g + column % (4 * many) // many, row // 8 + 2 * (column // (4 * many))
    values = kept[:, lane, register, column % many]
    dense = np.zeros((len(kept), 16, 16 * many), kept.dtype)
    dense[np.arange(len(kept))[:, None], row, where] = values
    return dense


def _multiply(grid: Any, types: str, c: Any, a: Any, b: Any, metadata: Any) -> None:
    """Floats add up in float64, rounded once: the hardware's own order is not documented."""
    running = grid.mask.reshape(-1, _WARP)
    assert (running.all(1) | ~running.any(1)).all(), "a warp's instruction on a part of the warp"
    warps = np.flatnonzero(running[:, 0])
    of_a, of_b = _TYPES[types]
    exact, of_c = ("float64", "float32") if of_a == "float16" else ("int32", "int32")
    kept, dense, sums = (
        _load(grid, pointer, dtype) for pointer, dtype in ((a, of_a), (b, of_b), (c, of_c))
    )
    words = np.broadcast_to(np.asarray(metadata, np.uint32), (grid.lanes,)).reshape(-1, _WARP)
    w = expand(kept[warps], words[warps]).astype(exact)
    many = dense.shape[-1]
    x = np.zeros((len(warps), 16 * many, 8), exact)
    g, t = np.divmod(np.arange(_WARP), 4)
    for register in range(_REGISTERS):
        for element in range(many):
            at = many * t + 4 * many * register + element
            x[:, at, g] = dense[warps, :, register, element]
    product = w @ x
    for register in range(_REGISTERS):
        row, column = g + 8 * (register // 2), 2 * t + register % 2
        sums[warps, :, register, 0] = sums[warps, :, register, 0] + product[:, row, column]
        total = np.ascontiguousarray(sums[:, :, register]).reshape(-1, 1)
        grid.write(_register(c, register), total.view(np.uint8))


def _load_words(grid: Any, registers: Any, source: Any) -> None:
    """Sixteen bytes as four words, one a register."""
    words = grid.read(source, 16).reshape(-1, _REGISTERS, 4)
    for i in range(_REGISTERS):
        grid.write(_register(registers, i), np.ascontiguousarray(words[:, i]))


def call(grid: Any, name: str, values: list[Any]) -> None:
    """The effect of ``graphopt_sparse_NAME`` on the grid's memory."""
    if name == "words":
        _load_words(grid, *values)
    else:
        _multiply(grid, name.removeprefix("mma_"), *values)
