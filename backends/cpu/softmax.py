"""Softmax over rows: the largest element is subtracted, the exponentials are summed as they are stored."""

from __future__ import annotations

import math

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.activation import exp
from graphopt.backends.cpu.emit import Buffer, Expr, bind, broadcast, constant, load, select, store
from graphopt.backends.cpu.fold import fold, largest, plus
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import activation_argument, build, kernel_name, sweep
from graphopt.backends.cpu.tokens import Softmax
from graphopt.errors import CompileError

_LEAST = -87.3  # e**x is a denormal or zero below


def exponential(x: Expr, lanes: int) -> Expr:
    """``e**x`` for x <= 0: 0 below -87.3 and for -inf, NaN for NaN."""
    x = bind(x)
    zero = constant("float32", 0.0, lanes)
    power = select(x <= zero, exp(x, lanes), x)
    return select(x < constant("float32", _LEAST, lanes), zero, power)


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
