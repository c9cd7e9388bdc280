"""What operators and device functions mean, on lanes: the documentation of CUDA and of the PTX ISA in NumPy."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from tests.backends.cuda import simt_sparse

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
    "expf": np.exp,
    "logf": np.log,
    "powf": np.power,
    "sqrtf": np.sqrt,
    "rsqrtf": lambda x: np.float32(1.0) / np.sqrt(x),
    "tanhf": np.tanh,
    "erff": np.vectorize(math.erf, otypes=[np.float32]),
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
    if name in ("graphopt_dot_u8", "graphopt_dot_s8"):
        return _dot(grid, "uint8" if name.endswith("u8") else "int8", *values)
    if name.startswith("graphopt_mma_"):
        return _multiply(grid, name.removeprefix("graphopt_mma_"), *values)
    if name == "graphopt_round_tf32":
        return _round_tf32(grid, *values)
    if name.startswith("graphopt_sparse_"):
        return simt_sparse.call(grid, name.removeprefix("graphopt_sparse_"), values)
    if name == "graphopt_load_matrices":
        return _load_matrices(grid, *values)
    if name == "graphopt_commit":
        return grid.commit()
    shuffle = re.fullmatch(r"tirx\.cuda\.__shfl_(\w+)", name)
    if shuffle is not None:
        return _shuffle(grid, shuffle[1], *values[1:4])
    if name == "tirx.cuda.__activemask":
        return np.uint32(0xFFFFFFFF)
    copy = re.fullmatch(r"graphopt_(copy|copy_part|copy_where|copy_or_\d+|wait)_(\d+)", name)
    assert copy is not None, f"{name} has no definition here"
    size = int(copy[2])
    if copy[1] == "wait":
        return grid.wait(size)
    fill = 0
    if copy[1].startswith("copy_or_"):
        fill = int(copy[1].removeprefix("copy_or_"))
    if copy[1] not in ("copy", "copy_part"):
        values[2] = np.where(values[2], size, 0)
    return grid.announce(*values[:2], size, grid.asynchronous and size >= 4, *values[2:], fill=fill)


def _shuffle(grid: Any, how: str, value: Any, offset: Any, width: Any) -> Array:
    """CUDA's ``__shfl_sync`` and its kin: a value of another lane of the warp, which must run too."""
    lane = np.arange(grid.lanes)
    within = lane % grid.threads % WARP
    part = within % width
    places = {"sync": offset % width, "down_sync": part + offset, "xor_sync": part ^ offset}
    place = np.where(places[how] < width, places[how], part)
    source = lane - part + place
    inside = source % grid.threads // WARP == lane % grid.threads // WARP
    source = np.where(inside & (source < grid.lanes), source, lane)
    assert grid.mask[source[grid.mask]].all(), "a shuffle from a thread that does not run"
    result: Array = np.broadcast_to(np.asarray(value), (grid.lanes,))[source]
    return result


def _lanes(grid: Any, value: Any, dtype: str) -> Array:
    whole = np.broadcast_to(np.asarray(value), (grid.lanes,))
    return np.ascontiguousarray(whole.astype(dtype)).reshape(-1, 1)


def _dot(grid: Any, dtype: str, x: Any, weight: Any, accumulator: Any) -> Array:
    left = _lanes(grid, x, "uint32").view(dtype).astype(np.int32)
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


# Of "Matrix fragments for mma.m16n8k8 / m16n8k16 / m16n8k32" in the PTX ISA: elements of a register, and what they are.
_PRODUCTS = {
    "u8": ("uint8", "int8", "int32"),
    "s8": ("int8", "int8", "int32"),
    "f16": ("float16", "float16", "float32"),
    "tf32": ("float32", "float32", "float32"),
}


def fragment_of_a(bytes_: int, lane: Array, register: int, element: int) -> tuple[Array, Array]:
    """Row and column (of k) in A of an element of one of a lane's four registers, elements of ``bytes_`` bytes."""
    group, within = np.divmod(lane, 4)
    many = 4 // bytes_  # elements of a register
    row = group + 8 * (register % 2)
    return row, within * many + element + 4 * many * (register // 2)


def fragment_of_b(bytes_: int, lane: Array, register: int, element: int) -> tuple[Array, Array]:
    """Row (of k) and column in B of an element of one of a lane's two registers."""
    group, within = np.divmod(lane, 4)
    many = 4 // bytes_
    return within * many + element + 4 * many * register, group


def fragment_of_c(lane: Array, register: int) -> tuple[Array, Array]:
    """Row and column of a sum."""
    group, within = np.divmod(lane, 4)
    return group + 8 * (register // 2), within * 2 + register % 2


def _multiply(grid: Any, name: str, c: Any, a: Any, b: Any) -> None:
    """Sums of 32 bytes of k; of floats in float64, rounded once: the hardware's own order is not documented."""
    _whole_warps(grid)
    of_a, of_b, of_c = _PRODUCTS[name]
    lane, size = np.arange(WARP), np.dtype(of_a).itemsize
    left, right = _registers(grid, a, 4, of_a), _registers(grid, b, 2, of_b)
    sums = _registers(grid, c, 4, of_c)
    if name == "tf32":
        for operand in (left, right):
            assert not (operand.view(np.uint32) & 0x1FFF).any(), "an operand that is no tf32"
    depth, many = 32 // size, 4 // size
    exact = "int32" if of_c == "int32" else "float64"
    x = np.zeros((len(left), 16, depth), exact)
    w = np.zeros((len(left), depth, 8), exact)
    total = np.zeros((len(left), 16, 8), exact)
    for i in range(4 * many):
        x[:, *fragment_of_a(size, lane, *divmod(i, many))] = left[:, :, i]
    for i in range(2 * many):
        w[:, *fragment_of_b(size, lane, *divmod(i, many))] = right[:, :, i]
    for i in range(4):
        total[:, *fragment_of_c(lane, i)] = sums[:, :, i]
    total = total + x @ w
    for i in range(4):
        value = total[:, *fragment_of_c(lane, i)].reshape(-1, 1)
        register = type(c)(c.storage, c.byte + 4 * i)
        grid.write(register, np.ascontiguousarray(value.astype(of_c)).view(np.uint8))


def _round_tf32(grid: Any, registers: Any) -> None:
    """PTX ISA, ``cvt.rna.tf32.f32``: to nearest among multiples of the 13th bit's weight, ties away from zero."""
    for i in range(4):
        register = type(registers)(registers.storage, registers.byte + 4 * i)
        value = np.ascontiguousarray(grid.read(register, 4)).view(np.float32).astype(np.float64)
        _, exponent = np.frexp(value)
        # 10 bits of fraction behind the leading one; below the normal numbers, multiples of 2**-136
        unit = np.ldexp(1.0, np.maximum(exponent - 11, -136))
        whole = np.trunc(value / unit + np.copysign(0.5, value)) * unit
        whole = np.where(np.isfinite(value), whole, value).astype(np.float32)
        grid.write(register, np.ascontiguousarray(whole).view(np.uint8))


def _load_matrices(grid: Any, registers: Any, row: Any) -> None:
    """PTX ISA, ``ldmatrix.x4``: lane ``8 i + r`` has the address of row r of matrix i."""
    _whole_warps(grid)
    rows = grid.read(row, 16).reshape(-1, WARP, 4, 4)
    lane = np.arange(WARP)
    for i in range(4):
        value = rows[:, 8 * i + lane // 4, lane % 4].reshape(-1, 4)
        register = type(registers)(registers.storage, registers.byte + 4 * i)
        grid.write(register, np.ascontiguousarray(value))
