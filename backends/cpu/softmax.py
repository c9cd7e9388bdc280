"""Softmax over rows: the largest element is subtracted, the exponentials are summed as they are stored."""

from __future__ import annotations

import math

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    broadcast,
    constant,
    intrinsic,
    load,
    store,
    vector,
)
from graphopt.backends.cpu.fold import fold, largest, plus
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import activation_argument, build, kernel_name, sweep
from graphopt.backends.cpu.tokens import Softmax
from graphopt.errors import CompileError

# 2**f = 1 + f * polynomial(f) to 9e-8 for |f| <= 1/2: the least of the largest relative errors
_POWER = (1.326460645e-3, 9.671524058e-3, 5.550734215e-2, 2.402224192e-1, 6.931469773e-1)
_LEAST = -88.0  # its power of two is 2**-127, which the exponent's bits say as 0
_ANCHOR = 1.5 * 2.0**23 + 127.0  # floats near it are whole: their last bits are n and the bias


def exponential(x: Expr, lanes: int) -> Expr:
    """``e**x`` for x <= 0: 0 below -87.7 and for -inf, NaN for NaN.

    ``2**n * 2**f`` with ``n + f = x * log2 e``, to 3e-7 for x > -5. An addition rounds, and a shift of the sum is 2**n: no
    conversions. The fence keeps TVM from taking the anchor away again before it has rounded.
    """
    factor, anchor = (constant("float32", v, lanes) for v in (math.log2(math.e), _ANCHOR))
    # of two operands, one of them NaN, the maximum is the second
    x = bind(T.max(constant("float32", _LEAST, lanes), x))
    floats = vector("float32", lanes)
    whole = bind(intrinsic(floats, "llvm.arithmetic.fence", x * factor + anchor))
    n = bind(whole - anchor)
    f = bind(x * factor - n)
    value = constant("float32", _POWER[0], lanes)
    for coefficient in (*_POWER[1:], 1.0):
        value = value * f + constant("float32", coefficient, lanes)
    bits = T.reinterpret(vector("int32", lanes), whole) << constant("int32", 23, lanes)
    return value * T.reinterpret(floats, bits)


def softmax(workload: Softmax, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, y)``; ``CompileError`` where the layouts differ or are not dense."""
    x, y = workload.x, workload.y
    if x != y or not x.is_dense:
        raise CompileError(f"softmax takes dense rows of one layout, not {x} to {y}; make them so.")
    name = kernel_name("softmax", f"{x.width}x{x.channels}", workload, isa.name, threads)
    arguments = [activation_argument("x", x), activation_argument("y", y)]

    def body(batch: Expr, flats: list[Buffer]) -> None:
        source, target = flats
        loop = T.parallel if threads > 1 else T.serial
        with loop(0, batch * (x.height * x.width)) as row:
            start = bind(row * x.channels)

            def emit_exponential(offset: Expr, lanes: int) -> Expr:
                value = load(source, start + offset, lanes)
                value = bind(exponential(value - broadcast(most, lanes), lanes))
                store(target, start + offset, value)
                return value

            most = fold(
                x.channels,
                isa.lanes,
                -math.inf,
                largest,
                lambda offset, lanes: load(source, start + offset, lanes),
            )
            total = fold(x.channels, isa.lanes, 0.0, plus, emit_exponential)
            inverse = bind(constant("float32", 1.0) / total)
            _scale(target, start, x.channels, isa.lanes, inverse)

    return build(name, arguments, body)


def _scale(buffer: Buffer, start: Expr, extent: int, lanes: int, factor: Expr) -> None:
    """Multiply a run in place: no vector may overlap another."""
    width = extent - extent % lanes
    if width:
        sweep(
            width,
            lanes,
            lambda offset, size: store(
                buffer,
                start + offset,
                load(buffer, start + offset, size) * broadcast(factor, size),
            ),
        )
    with T.serial(width, extent) as offset:
        store(buffer, start + offset, load(buffer, start + offset, 1) * factor)
