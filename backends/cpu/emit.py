"""Vector idioms in TIR, emitted inside an open ``IRBuilder``: every kernel of this folder is written in them.

A vector of one lane is a scalar. Expressions are trees: a value used twice must go through ``bind`` or it is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.isa import INT8_STEP, Isa

Expr = Any  # a TIR expression, or a Python integer where an index is meant
Buffer = Any  # tvm.tirx.Buffer

MAX_ALLOCA_BYTES = (
    1023  # a larger buffer becomes a heap workspace, and its accumulators leave the registers
)


@contextmanager
def kernel(name: str) -> Iterator[IRBuilder]:
    """Open a function called ``name`` whose arguments do not alias; ``builder.get()`` after the block is the PrimFunc."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield builder


def vector(dtype: str, lanes: int) -> str:
    """The name of the type: ``int32x16``, or ``int32`` for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def bind(value: Expr) -> Expr:
    """Compute ``value`` here, once."""
    return value if isinstance(value, int) else T.Bind(value)


def broadcast(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def constant(dtype: str, value: float, lanes: int = 1) -> Expr:
    """A constant in every lane."""
    return broadcast(tirx.const(value, dtype), lanes)


def load(buffer: Buffer, index: Expr, lanes: int) -> Expr:
    """``lanes`` consecutive elements of a flat buffer, unaligned."""
    return buffer.vload(index, vector(str(buffer.dtype), lanes))


def store(buffer: Buffer, index: Expr, value: Expr) -> None:
    """Consecutive elements of a flat buffer, unaligned."""
    T.add_to_parent(buffer.vstore(index, value))


def prefetch(buffer: Buffer, index: Expr, write: bool = False, near: bool = False) -> None:
    """Ask for the line of an element in L2, or L1 where ``near``; an address past the end does no harm."""
    address = T.address_of(buffer[index])
    locality = 3 if near else 2
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, int(write), locality, 1))


def flat(buffer: Buffer) -> Buffer:
    """The same memory as one dimension: kernels compute their own offsets."""
    size: Expr = 1
    for extent in buffer.shape:
        size = size * extent
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """An LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *arguments)


def pieces(lanes: int) -> list[tuple[int, int]]:
    """Cut a partial vector into ``(first lane, lanes)`` pieces of descending powers of two: 13 -> 8, 4, 1.

    Whole stores of each piece need no mask register, so that every instruction set writes partial vectors alike.
    """
    cut: list[tuple[int, int]] = []
    first = 0
    while first < lanes:
        size = 1 << ((lanes - first).bit_length() - 1)
        cut.append((first, size))
        first += size
    return cut


def slice_lanes(value: Expr, first: int, lanes: int, total: int) -> Expr:
    """Lanes ``first .. first + lanes`` of a vector of ``total``."""
    if lanes == total:
        return value
    return tirx.Shuffle([value], list(range(first, first + lanes)))


def select(condition: Expr, when_true: Expr, when_false: Expr) -> Expr:
    """Lane by lane, both sides computed."""
    return tirx.Select(condition, when_true, when_false)


def clamp(value: Expr, low: float, high: float, lanes: int) -> Expr:
    """``min(max(value, low), high)`` in float32."""
    value = T.max(value, constant("float32", low, lanes))
    return T.min(value, constant("float32", high, lanes))


def round_to_int(value: Expr, lanes: int, name: str = "llvm.lrint") -> Expr:
    """Half to even, in the default rounding mode; the value must fit int32 (clamp in float first).

    ``name`` is the row's own instruction, where ``value`` is one of its vectors.
    """
    return intrinsic(vector("int32", lanes), name, value)


def to_float(value: Expr, lanes: int) -> Expr:
    """float32(int32), rounded half to even."""
    return T.cast(value, vector("float32", lanes))


def multiply_add(isa: Isa, x: Expr, y: Expr, addend: Expr) -> Expr:
    """``x * y + addend`` in float32: one rounding where the row has fma, two elsewhere."""
    if not isa.fma:
        return x * y + addend
    return intrinsic(str(x.ty.dtype), "llvm.fma", x, y, addend)


def load_channels(buffer: Buffer, index: Expr, valid: int = INT8_STEP) -> Expr:
    """4 consecutive uint8 as the bytes of an int32; only the first ``valid`` are read, the others are 0."""
    if valid == INT8_STEP:
        return T.reinterpret("int32", load(buffer, index, INT8_STEP))
    word = T.cast(buffer.vload(index), "int32")
    for i in range(1, valid):
        word = word + T.cast(buffer.vload(index + i), "int32") * tirx.const(1 << (8 * i), "int32")
    return word


def flipped(isa: Isa, value: Expr, order: Sequence[int] = tuple(range(INT8_STEP))) -> Expr:
    """Bytes of activations as the row multiplies them; ``order`` are the channels of a step as they lie in ``value``, again
    and again. ``value`` is of any type."""
    if not any(isa.flips):
        return value
    word = sum(isa.flips[channel] << (8 * i) for i, channel in enumerate(order))
    lanes = value.ty.dtype.bits * value.ty.dtype.lanes // 32
    signed = word - 2**32 if word >= 2**31 else word
    mask = constant("int32", signed, lanes)
    return T.reinterpret(str(value.ty.dtype), T.reinterpret(vector("int32", lanes), value) ^ mask)


def load_steps(isa: Isa, buffer: Buffer, index: Expr) -> Expr:
    """The activations of ``steps_a_load`` steps of a pixel, for ``spread_step``: words of uint8, or float32."""
    if str(buffer.dtype) == "float32":
        return bind(load(buffer, index, isa.lanes))
    value = load(buffer, index, isa.lanes * INT8_STEP)
    return bind(flipped(isa, T.reinterpret(f"int32x{isa.lanes}", value)))


def spread_step(isa: Isa, value: Expr, step: int) -> list[Expr]:
    """The left operands of one step of ``load_steps``; LLVM makes them lanes that the multiply-adds read in place."""
    is_float = str(value.ty.dtype).startswith("float32")
    if is_float or isa.form != "long":
        word = tirx.Shuffle([value], [step] * isa.lanes)
        return [word if is_float else T.reinterpret(f"int8x{INT8_STEP * isa.lanes}", word)]
    pairs = T.reinterpret(f"int16x{2 * isa.lanes}", value)
    halves = [tirx.Shuffle([pairs], [2 * step + half] * isa.lanes) for half in (0, 1)]
    return [bind(T.reinterpret(f"int8x{2 * isa.lanes}", half)) for half in halves]


def spread_channels(isa: Isa, word: Expr) -> list[Expr]:
    """4 uint8 in an int32, broadcast as the left operands of the row's dot products: one vector a half.

    A row of pairs takes channels 0 and 2 in its first half and 1 and 3 in its second, as 16-bit lanes: one mask and one shift
    of the broadcast word, cheaper than unpacking.
    """
    lanes = isa.lanes
    if isa.form == "pairs":
        return spread_bytes(isa, broadcast(word, lanes))
    if isa.form == "long":
        return spread_step(isa, bind(flipped(isa, broadcast(word, lanes))), 0)
    return [bind(T.reinterpret(f"int8x{4 * lanes}", flipped(isa, broadcast(word, lanes))))]


def spread_bytes(isa: Isa, value: Expr) -> list[Expr]:
    """A vector of uint8 as the left operands of a row of pairs: the even bytes of its 16-bit lanes, and the odd ones."""
    lanes = isa.lanes
    spread = bind(T.reinterpret(f"uint16x{2 * lanes}", value))
    even = spread & constant("uint16", 0xFF, 2 * lanes)
    odd = tirx.Cast(f"uint16x{2 * lanes}", spread >> constant("uint16", 8, 2 * lanes))
    return [bind(T.reinterpret(f"int16x{2 * lanes}", half)) for half in (even, odd)]


def halves_of(isa: Isa, value: Expr) -> list[Expr]:
    """A vector of bytes in the order of "long" as the operands of its two products."""
    size = 2 * isa.lanes
    return [slice_lanes(value, half * size, size, 2 * size) for half in (0, 1)]


def halves_of_lanes(isa: Isa, value: Expr) -> list[Expr]:
    """Bytes ``[lane][4]`` as the operands of the products of "long"."""
    pairs = bind(T.reinterpret(f"int16x{2 * isa.lanes}", value))
    halves = [tirx.Shuffle([pairs], list(range(half, 2 * isa.lanes, 2))) for half in (0, 1)]
    return [bind(T.reinterpret(f"int8x{2 * isa.lanes}", half)) for half in halves]


def load_weights(isa: Isa, buffer: Buffer, index: Expr) -> list[Expr]:
    """The right operands of an int8 step, packed ``[half][lane][group]`` int8: one vector a half."""
    if isa.form in ("dot", "matrix"):
        return [bind(load(buffer, index, isa.lanes * INT8_STEP))]
    if isa.form == "long":
        size = 2 * isa.lanes
        return [bind(load(buffer, index + half * size, size)) for half in (0, 1)]
    size = isa.lanes * isa.dot_group
    return [
        bind(T.cast(load(buffer, index + half * size, size), f"int16x{size}"))
        for half in range(isa.halves)
    ]


def dot(isa: Isa, accumulator: Expr, x: list[Expr], weights: list[Expr]) -> Expr:
    """``accumulator + sum over 4 channels of x * weight`` in every lane, exact in int32."""
    dtype = vector("int32", isa.lanes)
    if isa.form == "long":
        return accumulator + _long_dot(isa, x, weights)
    if any(isa.flips):  # of two int8 operands the second one may be a lane
        x, weights = weights, x
    for left, right in zip(x, weights, strict=True):
        if isa.dot_accumulates:
            accumulator = intrinsic(dtype, isa.dot_intrinsic, accumulator, left, right)
        else:
            accumulator = accumulator + intrinsic(dtype, isa.dot_intrinsic, left, right)
    return accumulator


def _long_dot(isa: Isa, x: list[Expr], weights: list[Expr]) -> Expr:
    """Pairs of ``x * weight`` of the first half less those of the second one; ``smull``, ``smlsl``, ``sadalp``."""
    if len(x) == 1:
        x = halves_of(isa, x[0])
    if len(weights) == 1:
        weights = halves_of(isa, weights[0])
    words = f"int16x{2 * isa.lanes}"
    first, second = (
        intrinsic(words, isa.dot_intrinsic, left, right)
        for left, right in zip(x, weights, strict=True)
    )
    return intrinsic(vector("int32", isa.lanes), "llvm.aarch64.neon.saddlp", first - second)


def dot_pairs(isa: Isa, accumulator: Expr, x: Expr, weights: Expr) -> Expr:
    """``accumulator + sum over 2 channels of x * weight`` modulo 2**32; both are int32 vectors of int16 pairs."""
    pairs = vector("int16", 2 * isa.lanes)
    left, right = T.reinterpret(pairs, x), T.reinterpret(pairs, weights)
    dtype = vector("int32", isa.lanes)
    if not isa.pair_intrinsic:
        return multiply_halves(isa, accumulator, halves_of_pairs(isa, left), right)
    if isa.dot_accumulates:
        return intrinsic(dtype, isa.pair_intrinsic, accumulator, left, right)
    return accumulator + intrinsic(dtype, isa.pair_intrinsic, left, right)


def halves_of_pairs(isa: Isa, pairs: Expr) -> list[Expr]:
    """The even and the odd ones of a vector of int16."""
    lanes = 2 * isa.lanes
    return [tirx.Shuffle([pairs], list(range(odd, lanes, 2))) for odd in (0, 1)]


def multiply_halves(isa: Isa, accumulator: Expr, x: Sequence[Expr], weights: Expr) -> Expr:
    """``dot_pairs`` by two widening multiply-adds; ``x`` are int16, the first and the second of every pair."""
    dtype = vector("int32", isa.lanes)
    for left, right in zip(x, halves_of_pairs(isa, weights), strict=True):
        accumulator = accumulator + T.cast(left, dtype) * T.cast(right, dtype)
    return accumulator


def spread_pairs(isa: Isa, value: Expr, step: int) -> list[Expr]:
    """One of the pairs of a vector, for ``multiply_halves``, which reads its lanes in place."""
    pairs = T.reinterpret(vector("int16", 2 * isa.lanes), value)
    return [tirx.Shuffle([pairs], [2 * step + odd] * isa.lanes) for odd in (0, 1)]


def pack(isa: Isa, dtype: str, name: str, a: Expr, b: Expr) -> Expr:
    """Two vectors as one of elements of half the width, saturating: ``pack_words`` or ``pack_bytes`` of the row."""
    lanes = a.ty.dtype.lanes
    if isa.packs_two:
        return intrinsic(vector(dtype, 2 * lanes), name, a, b)
    halves = [bind(intrinsic(vector(dtype, lanes), name, value)) for value in (a, b)]
    return tirx.Shuffle(halves, list(range(2 * lanes)))


class Accumulators:
    """``rows`` x ``columns`` vectors that LLVM keeps in registers: buffers under 1,024 bytes, constant indices only."""

    def __init__(self, rows: int, columns: int, dtype: str, lanes: int) -> None:
        self._rows = rows
        self._columns = columns
        self._lanes = lanes
        self._per_buffer = MAX_ALLOCA_BYTES // (4 * lanes)
        count = rows * columns
        self._buffers = [
            T.alloc_buffer((min(self._per_buffer, count - first) * lanes,), dtype, scope="global")
            for first in range(0, count, self._per_buffer)
        ]

    def _place(self, row: int, column: int) -> tuple[Buffer, int]:
        index, slot = divmod(row * self._columns + column, self._per_buffer)
        return self._buffers[index], slot * self._lanes

    def begin(self, column: int, value: Expr) -> None:
        """Put ``value`` into every row of a column."""
        for row in range(self._rows):
            self.set(row, column, value)

    def vector(self, row: int, column: int) -> Expr:
        """The sums of a pixel and a channel vector, however registers hold them."""
        return self.get(row, column)

    def get(self, row: int, column: int) -> Expr:
        """The vector at ``(row, column)``."""
        buffer, offset = self._place(row, column)
        return load(buffer, offset, self._lanes)

    def set(self, row: int, column: int, value: Expr) -> None:
        """Replace the vector at ``(row, column)``."""
        buffer, offset = self._place(row, column)
        store(buffer, offset, value)


def loop(extent: Expr, parallel: bool = False) -> Any:
    """A serial or parallel loop from 0; ``with loop(n) as i``."""
    return T.parallel(0, extent) if parallel else T.serial(0, extent)


def floor_div(a: Expr, b: int) -> Expr:
    """``a // b`` for non-negative ``a``."""
    return a if b == 1 else a // b if isinstance(a, int) else tirx.floordiv(a, b)


def floor_mod(a: Expr, b: int) -> Expr:
    """``a % b`` for non-negative ``a``."""
    return 0 if b == 1 else a % b if isinstance(a, int) else tirx.floormod(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller of two indices."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tvm.tirx.min(a, b)
