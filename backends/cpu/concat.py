"""Concatenation along channels in NHWC; an input of other quantization parameters is requantized on the way."""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind, constant, to_float, vector
from graphopt.backends.cpu.epilogue import round_and_clamp
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import (
    View,
    activation_argument,
    build,
    fill_pad_channels,
    for_rows,
    kernel_name,
    sweep,
)
from graphopt.backends.cpu.workload import Concat
from graphopt.errors import CompileError


def _check(workload: Concat) -> None:
    y = workload.y
    if sum(layout.channels for layout in workload.inputs) != y.channels:
        counts = [layout.channels for layout in workload.inputs]
        raise CompileError(f"concat of {counts} channels does not make {y.channels}; fix y.")
    for layout in workload.inputs:
        if (layout.batch, layout.height, layout.width) != (y.batch, y.height, y.width):
            raise CompileError(f"concat: {layout} and {y} differ in batch, height or width.")


def concat(workload: Concat, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x0, x1, ..., y)``; raises ``CompileError`` where the shapes do not add up."""
    _check(workload)
    y = workload.y
    rescale = workload.requantize or (None,) * len(workload.inputs)
    key = replace(workload, inputs=tuple(replace(x, fill=0) for x in workload.inputs))
    legible = f"{y.height}x{y.width}x{y.channels}_{len(workload.inputs)}"
    name = kernel_name("concat", legible, key, isa.name, threads)
    arguments = [activation_argument(f"x{i}", x) for i, x in enumerate(workload.inputs)]
    arguments.append(activation_argument("y", y))
    element_bytes = 4 if y.dtype == "float32" else 1

    def body(batch: Expr, flats: list[Buffer]) -> None:
        target = View(y, flats[-1], batch)
        sources = [
            View(x, flat, batch) for x, flat in zip(workload.inputs, flats[:-1], strict=True)
        ]

        def part(index: int, source: Expr, base: Expr) -> None:
            view, parameters = sources[index], rescale[index]

            def emit(offset: Expr, lanes: int) -> None:
                value = view.load(source + offset, lanes)
                if parameters is not None:
                    multiplier, zero_point, rounding = parameters
                    wide = T.cast(value, vector("int32", lanes))
                    centred = wide - constant("int32", zero_point, lanes)
                    scaled = to_float(centred, lanes) * constant("float32", multiplier, lanes)
                    q = round_and_clamp(rounding, bind(scaled), lanes)
                    value = T.cast(q, vector(y.dtype, lanes))
                target.store(base + offset, value)

            lanes = isa.lanes if parameters is not None else isa.vector_bytes // element_bytes
            sweep(view.layout.channels, lanes, emit)

        def row_body(image: Expr, row: Expr) -> None:
            with T.serial(0, y.width) as column:
                start = bind(target.at(image, row, column))
                first = 0
                for index, view in enumerate(sources):
                    part(index, bind(view.at(image, row, column)), start + first)
                    first += view.layout.channels
                fill_pad_channels(target, start, isa.vector_bytes)

        for_rows(target, isa.vector_bytes, threads, row_body)

    return build(name, arguments, body)
