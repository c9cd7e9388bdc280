"""What the device functions of sparse products mean, on lanes: ``mma.sp::ordered_metadata.m16n8k64`` by the PTX ISA.

A is 16 x 64 with two of every four neighbours of a row kept, so 16 x 32 in registers; B is 64 x 8. Of lane ``4 g + t``, register n
holds of A the bytes ``4 t + 16 (n / 2) ..`` of row ``g + 8 (n % 2)``, of B the bytes ``4 t + 16 n ..`` of column g. Its metadata
are the indices of row ``g + 8 (t % 2)``, columns ``32 (t / 2) ..`` of A: four bits a group of four, the lower index in the lower two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_WARP, _REGISTERS = 32, 4
_TYPES = {"u8": "uint8", "s8": "int8"}
ORDERED = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)  # any other four bits are undefined


def _register(pointer: Any, index: int) -> Any:
    return type(pointer)(pointer.storage, pointer.byte + 4 * index)


def _load(grid: Any, pointer: Any, dtype: str) -> Array:
    """Four registers of the running warps, ``[warps, lanes, register, element]``."""
    words = [grid.read(_register(pointer, i), 4) for i in range(_REGISTERS)]
    whole = np.ascontiguousarray(np.stack(words, axis=1)).view(dtype)
    return whole.reshape(-1, _WARP, *whole.shape[1:])


def expand(kept: Array, words: Array) -> Array:
    """A as ``[warps, 16, 64]`` of its registers ``[warps, 32, 4, 4]`` and metadata ``[warps, 32]``."""
    codes = words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    assert np.isin(codes, ORDERED).all(), "metadata that is undefined"
    row, column = np.divmod(np.arange(16 * 32), 32)  # of every kept element
    g, group = row % 8, column // 2
    indices = words[:, 4 * g + row // 8 + 2 * (group // 8)]
    shift = (4 * (group % 8) + 2 * (column % 2)).astype(np.uint32)
    where = 4 * group + (indices >> shift & np.uint32(3)).astype(int)
    values = kept[:, 4 * g + column % 16 // 4, row // 8 + 2 * (column // 16), column % 4]
    dense = np.zeros((len(kept), 16, 64), np.int32)
    dense[np.arange(len(kept))[:, None], row, where] = values
    return dense


def _multiply(grid: Any, types: str, c: Any, a: Any, b: Any, metadata: Any) -> None:
    running = grid.mask.reshape(-1, _WARP)
    assert (running.all(1) | ~running.any(1)).all(), "a warp's instruction on a part of the warp"
    warps = np.flatnonzero(running[:, 0])
    kept, dense, sums = (
        _load(grid, pointer, dtype)
        for pointer, dtype in ((a, "int8"), (b, _TYPES[types]), (c, "int32"))
    )
    words = np.broadcast_to(np.asarray(metadata, np.uint32), (grid.lanes,)).reshape(-1, _WARP)
    w = expand(kept[warps], words[warps])
    x = np.zeros((len(warps), 64, 8), np.int32)
    g, t = np.divmod(np.arange(_WARP), 4)
    for register in range(_REGISTERS):
        for byte in range(4):
            x[:, 4 * t + 16 * register + byte, g] = dense[warps, :, register, byte]
    product = w @ x
    for register in range(_REGISTERS):
        row, column = g + 8 * (register // 2), 2 * t + register % 2
        sums[warps, :, register, 0] += product[:, row, column]
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
