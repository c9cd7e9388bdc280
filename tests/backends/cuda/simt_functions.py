"""What operators and device functions mean, on lanes: the documentation of CUDA and of the PTX ISA in NumPy."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
WARP = 32

BINARY: dict[str, Any] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: _divide(a, b),
    "Mod": np.fmod,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.fmin,
    "Max": np.fmax,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "LShift": np.left_shift,
    "RShift": np.right_shift,
}
_ELEMENTWISE: dict[str, Any] = {
    "tirx.exp": np.exp,
    "tirx.tanh": np.tanh,
    "tirx.erf": np.vectorize(math.erf, otypes=[np.float32]),
    "__fmul_rn": np.multiply,
}


def _divide(a: Any, b: Any) -> Any:
    """C's division: towards zero for integers."""
    quotient = np.divide(a, b)
    kind = np.result_type(a, b)
    return quotient if kind.kind == "f" else np.trunc(quotient).astype(kind)


def call(grid: Any, name: str, values: list[Any]) -> Any:
    """The value of a call, or its effect on the grid's memory."""
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name](*values)
    if name == "__float2int_rn":
        return np.rint(values[0]).astype(np.int64).astype(np.int32)
    if name == "graphopt_dot":
        return _dot(grid, *values)
    if name == "graphopt_mma":
        return _multiply(grid, *values)
    if name == "graphopt_load_matrices":
        return _load_matrices(grid, *values)
    if name == "graphopt_commit":
        return grid.commit()
    copy = re.fullmatch(r"graphopt_(copy|fill|wait)_(\d+)", name)
    assert copy is not None, f"{name} has no definition here"
    size = int(copy[2])
    if copy[1] == "wait":
        return grid.wait(size)
    if copy[1] == "copy":
        return grid.announce(values[0], values[1], size, grid.asynchronous)
    word = np.broadcast_to(np.asarray(values[1], np.uint32), (grid.lanes,))
    words = np.repeat(word[:, None], size // 4, axis=1)
    return grid.write(values[0], np.ascontiguousarray(words).view(np.uint8))


def _lanes(grid: Any, value: Any, dtype: str) -> Array:
    whole = np.broadcast_to(np.asarray(value), (grid.lanes,))
    return np.ascontiguousarray(whole.astype(dtype)).reshape(-1, 1)


def _dot(grid: Any, x: Any, weight: Any, accumulator: Any) -> Array:
    left = _lanes(grid, x, "uint32").view(np.uint8).astype(np.int32)
    right = _lanes(grid, weight, "int32").view(np.int8).astype(np.int32)
    total: Array = (left * right).sum(1, dtype=np.int32) + np.asarray(accumulator, np.int32)
    return total


def _whole_warps(grid: Any) -> None:
    running = grid.mask.reshape(-1, WARP)
    assert (running.all(1) | ~running.any(1)).all(), "a warp's instruction on a part of the warp"


def _registers(grid: Any, pointer: Any, count: int, dtype: str) -> Array:
    """``[warps, lanes, count]``, loaded word by word."""
    words = [
        grid.read(type(pointer)(pointer.storage, pointer.byte + 4 * i), 4) for i in range(count)
    ]
    whole = np.ascontiguousarray(np.concatenate(words, axis=1)).view(dtype)
    return whole.reshape(-1, WARP, *whole.shape[1:])


def _multiply(grid: Any, c: Any, a: Any, b: Any) -> None:
    """PTX ISA, "Matrix fragments for mma.m16n8k32"."""
    _whole_warps(grid)
    group, within = np.divmod(np.arange(WARP), 4)
    left = _registers(grid, a, 4, "uint8")
    right = _registers(grid, b, 2, "int8")
    sums = _registers(grid, c, 4, "int32")
    warps = len(left)
    x = np.zeros((warps, 16, 32), np.int32)
    w = np.zeros((warps, 32, 8), np.int32)
    total = np.zeros((warps, 16, 8), np.int32)
    for i in range(16):
        row = group + (8 if i % 8 >= 4 else 0)
        x[:, row, within * 4 + i % 4 + (16 if i >= 8 else 0)] = left[:, :, i]
    for i in range(8):
        w[:, within * 4 + i % 4 + (16 if i >= 4 else 0), group] = right[:, :, i]
    for i in range(4):
        total[:, group + (8 if i >= 2 else 0), within * 2 + i % 2] = sums[:, :, i]
    total = total + x @ w
    for i in range(4):
        value = total[:, group + (8 if i >= 2 else 0), within * 2 + i % 2].reshape(-1, 1)
        register = type(c)(c.storage, c.byte + 4 * i)
        grid.write(register, np.ascontiguousarray(value, np.int32).view(np.uint8))


def _load_matrices(grid: Any, registers: Any, row: Any) -> None:
    """PTX ISA, ``ldmatrix.x4``: lane ``8 i + r`` has the address of row r of matrix i."""
    _whole_warps(grid)
    rows = grid.read(row, 16).reshape(-1, WARP, 4, 4)
    lane = np.arange(WARP)
    for i in range(4):
        value = rows[:, 8 * i + lane // 4, lane % 4].reshape(-1, 4)
        register = type(registers)(registers.storage, registers.byte + 4 * i)
        grid.write(register, np.ascontiguousarray(value))
