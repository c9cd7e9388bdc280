"""The vector epilogue: what happens between the last product and the store, on expressions of any number of lanes.

The order of float operations is the definition's: one product, a clamp, a rounding, then integers. No product feeds a
sum in float, so there is nothing for LLVM to contract, but where a float residual is added to dequantized sums: a fence
stands between.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.activation import apply_activation
from graphopt.backends.cpu.emit import (
    Expr,
    bind,
    clamp,
    constant,
    intrinsic,
    pack,
    round_to_int,
    to_float,
    vector,
)
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Epilogue, QuantizedAdd, Requantize

PACKED_VECTORS = 4  # int32 vectors that become one of bytes


def round_and_clamp(requantize: Requantize | QuantizedAdd, value: Expr, lanes: int) -> Expr:
    """``zero_point + rint(clamp(value, qmin - zero_point, qmax - zero_point))`` of a float32 value, as int32."""
    rounded = _round_clamped(requantize, value, lanes)
    return rounded + constant("int32", requantize.zero_point, lanes)


def _round_clamped(
    bounds: Requantize | QuantizedAdd, value: Expr, lanes: int, rounding: str = "llvm.lrint"
) -> Expr:
    low, high = bounds.qmin - bounds.zero_point, bounds.qmax - bounds.zero_point
    return round_to_int(clamp(value, low, high, lanes), lanes, rounding)


def _fence(value: Expr, lanes: int) -> Expr:
    """The value as it is rounded: nothing before it is contracted or folded with what follows."""
    return intrinsic(vector("float32", lanes), "llvm.arithmetic.fence", value)


def _dequantized(
    epilogue: Epilogue,
    accumulator: Expr,
    multiplier: Expr,
    residual: Expr | None,
    lanes: int,
    isa: Isa | None,
) -> Expr:
    """``activation(float32(accumulator) * multiplier + residual)``."""
    v = _fence(to_float(accumulator, lanes) * multiplier, lanes)
    if residual is not None:
        v = v + residual
    return apply_activation(epilogue.activation, v, lanes, isa)


def _scaled(epilogue: Epilogue, value: Expr, lanes: int) -> Expr:
    """A float over the scale of the bytes that it becomes."""
    return _fence(value, lanes) * constant("float32", epilogue.inverse_scale, lanes)


def _round_below(
    parameters: Requantize,
    accumulator: Expr,
    multiplier: Expr,
    lanes: int,
    rounding: str = "llvm.lrint",
) -> Expr:
    """``rint(min(float32(accumulator) * multiplier, qmax - zero_point))`` as int32.

    The bounds are integers: clamping may wait until after the rounding, where integer instructions of every vector pipe do
    it. The upper bound may not: what exceeds int32 is rounded to its least element.
    """
    high = constant("float32", parameters.qmax - parameters.zero_point, lanes)
    return round_to_int(T.min(to_float(accumulator, lanes) * multiplier, high), lanes, rounding)


def requantize(parameters: Requantize, accumulator: Expr, multiplier: Expr, lanes: int) -> Expr:
    """``zero_point + rint(clamp(float32(accumulator) * multiplier, ...))`` as int32."""
    rounded = _round_below(parameters, accumulator, multiplier, lanes)
    shifted = rounded + constant("int32", parameters.zero_point, lanes)
    return T.max(shifted, constant("int32", parameters.qmin, lanes))


def _scaled_sum(add: QuantizedAdd, a: Expr, b: Expr, lanes: int) -> Expr:
    """``(a - a_zero_point) * a_multiplier + (b - b_zero_point) * b_multiplier`` in int32.

    Both zero points go into one constant; int32 wraps, so that the sum is the definition's whatever the order.
    """
    offset = add.a_zero_point * add.a_multiplier + add.b_zero_point * add.b_multiplier
    v = a * constant("int32", add.a_multiplier, lanes)
    v = v + b * constant("int32", add.b_multiplier, lanes)
    return v - constant("int32", offset, lanes)


def _rounds_by_adding(add: QuantizedAdd) -> bool:
    """True where ``_round_shifted`` is exact: every sum is below ``2**(22 + shift)`` in magnitude."""
    largest = 255 * (abs(add.a_multiplier) + abs(add.b_multiplier))
    return 0 <= add.shift <= 64 and largest < 2 ** (22 + add.shift)


def _round_shifted(add: QuantizedAdd, value: Expr, lanes: int) -> Expr:
    """``zero_point + rint(float32(value) * 2**-shift)`` as int32, without a multiplication.

    The float32 from ``2**(23 + shift)`` to twice that are the multiples of ``2**shift``: adding 1.5 times the lower end
    rounds to one of them, half to even, and the bits of the sum count them.
    """
    anchor = np.float32(1.5 * 2.0 ** (23 + add.shift))
    total = to_float(value, lanes) + constant("float32", float(anchor), lanes)
    bits = T.reinterpret(vector("int32", lanes), total)
    return bits - constant("int32", int(anchor.view(np.int32)) - add.zero_point, lanes)


def quantized_add(add: QuantizedAdd, a: Expr, b: Expr, lanes: int) -> Expr:
    """``QuantizedAdd`` of two int32 vectors, as int32."""
    v = _scaled_sum(add, a, b, lanes)
    if not _rounds_by_adding(add):
        scaled = to_float(v, lanes) * constant("float32", 2.0**-add.shift, lanes)
        return round_and_clamp(add, scaled, lanes)
    q = T.max(_round_shifted(add, v, lanes), constant("int32", add.qmin, lanes))
    return T.min(q, constant("int32", add.qmax, lanes))


def _in_order(isa: Isa, q: Expr) -> Expr:
    """The packs work on 128-bit parts: 4 bytes of each vector stand in a part's order and are put in the vectors'."""
    parts = isa.lanes // 4
    if parts == 1:
        return q
    order = [PACKED_VECTORS * (i % parts) + i // parts for i in range(isa.lanes)]
    groups = bind(T.reinterpret(vector("int32", isa.lanes), q))
    return T.reinterpret(f"uint8x{PACKED_VECTORS * isa.lanes}", tirx.Shuffle([groups], order))


def interleaved(isa: Isa, q: Expr) -> Expr:
    """The packs' bytes with those of one lane side by side: byte ``i`` of a lane is from vector ``i``."""
    size = PACKED_VECTORS * isa.lanes
    order = [
        16 * part + 4 * i + k for part in range(size // 16) for k in range(4) for i in range(4)
    ]
    return tirx.Shuffle([bind(q)], order)


def packed_epilogue(
    isa: Isa,
    epilogue: Epilogue,
    accumulators: list[Expr],
    multipliers: list[Expr],
    residuals: list[Expr],
) -> Expr:
    """``apply_epilogue`` to uint8 of ``PACKED_VECTORS`` whole vectors, side by side in one vector of bytes.

    Emits bindings: call it inside an open builder.
    """
    rows = zip(accumulators, multipliers, residuals, strict=True)
    sums = [bind(before_pack(isa, epilogue, *row)) for row in rows]
    words = [bind(pack_words(isa, epilogue, *sums[i : i + 2])) for i in (0, 2)]
    return _in_order(isa, pack_bytes(isa, epilogue, *words))


def before_pack(
    isa: Isa, epilogue: Epilogue, accumulator: Expr, multiplier: Expr, residual: Expr | None
) -> Expr:
    """An int32 vector of which ``pack_words`` and ``pack_bytes`` make the epilogue's bytes; the residual is the raw vector."""
    first, add = epilogue.requantize, epilogue.residual_add
    assert first is not None
    if epilogue.inverse_scale:
        v = _dequantized(epilogue, accumulator, multiplier, residual, isa.lanes, isa)
        scaled = _scaled(epilogue, v, isa.lanes)
        return _round_clamped(first, scaled, isa.lanes, isa.round_intrinsic)
    if add is None and first.fits:
        scaled = to_float(accumulator, isa.lanes) * multiplier
        return round_to_int(scaled, isa.lanes, isa.round_intrinsic)
    rounded = _round_below(first, accumulator, multiplier, isa.lanes, isa.round_intrinsic)
    if add is None:
        return rounded
    # the layer's own zero point goes into the sum's constant
    a = bind(T.max(rounded, constant("int32", first.qmin - first.zero_point, isa.lanes)))
    add = replace(add, a_zero_point=add.a_zero_point - first.zero_point)
    b = T.cast(residual, vector("int32", isa.lanes))
    return round_sum(add, _scaled_sum(add, a, b, isa.lanes), isa.lanes)


def round_sum(add: QuantizedAdd, value: Expr, lanes: int) -> Expr:
    """The sum of a ``QuantizedAdd`` rounded, as int32; the packs clamp it."""
    if _rounds_by_adding(add):
        return _round_shifted(add, value, lanes)
    return round_and_clamp(
        add, to_float(value, lanes) * constant("float32", 2.0**-add.shift, lanes), lanes
    )


def _packed_range(epilogue: Epilogue) -> tuple[int, int, int]:
    """What the packs add, and the bounds of the result."""
    first, add = epilogue.requantize, epilogue.residual_add
    assert first is not None
    return (first.zero_point, first.qmin, first.qmax) if add is None else (0, add.qmin, add.qmax)


def pack_words(isa: Isa, epilogue: Epilogue, a: Expr, b: Expr) -> Expr:
    """Two vectors of ``before_pack`` as int16."""
    zero_point, _, _ = _packed_range(epilogue)
    size = 2 * isa.lanes
    words = bind(pack(isa, "int16", isa.pack_words, a, b))
    if not zero_point:
        return words
    added = constant("int16", zero_point, size)
    # without an upper bound a word may be the largest there is
    first, add = epilogue.requantize, epilogue.residual_add
    if add is None and first is not None and first.fits:
        return intrinsic(f"int16x{size}", "llvm.sadd.sat", words, added)
    return words + added


def pack_bytes(isa: Isa, epilogue: Epilogue, a: Expr, b: Expr) -> Expr:
    """The bytes of two vectors of ``pack_words``, in the order of the packs: they saturate to 0 .. 255."""
    _, qmin, qmax = _packed_range(epilogue)
    size = PACKED_VECTORS * isa.lanes
    q = T.reinterpret(f"uint8x{size}", pack(isa, "int8", isa.pack_bytes, a, b))
    if qmin > 0:
        q = T.max(q, constant("uint8", qmin, size))
    if qmax < 255:
        q = T.min(q, constant("uint8", qmax, size))
    return q


def apply_epilogue(
    epilogue: Epilogue,
    accumulator: Expr,
    lanes: int,
    multiplier: Expr | None = None,
    residual: Expr | None = None,
    out_dtype: str = "float32",
    isa: Isa | None = None,
) -> Expr:
    """Turn ``lanes`` accumulators, the bias already in them, into the elements to store, of ``out_dtype``.

    ``accumulator`` is int32 where ``multiplier`` (float32, one a lane) is given, else float32. ``residual`` is the raw
    vector of the residual tensor, where the epilogue takes one. ``isa`` as in ``apply_activation``. Emits bindings: call it
    inside an open builder.
    """
    if multiplier is None:
        v = accumulator if residual is None else accumulator + residual
        return apply_activation(epilogue.activation, v, lanes, isa)
    if epilogue.requantize is None:
        return _dequantized(epilogue, accumulator, multiplier, residual, lanes, isa)
    if epilogue.inverse_scale:
        v = _dequantized(epilogue, accumulator, multiplier, residual, lanes, isa)
        q = round_and_clamp(epilogue.requantize, _scaled(epilogue, v, lanes), lanes)
        return T.cast(q, vector(out_dtype, lanes))
    q = requantize(epilogue.requantize, accumulator, multiplier, lanes)
    if epilogue.residual_add is not None and residual is not None:
        b = T.cast(residual, vector("int32", lanes))
        q = quantized_add(epilogue.residual_add, bind(q), b, lanes)
    return T.cast(q, vector(out_dtype, lanes))
