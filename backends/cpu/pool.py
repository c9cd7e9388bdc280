"""Max and average pooling over NHWC windows: one vector of channels at a time, taps innermost.

Rows and columns whose window lies inside the map take every tap without a test; near a border the taps run from the
first to the last that touches the map, so that no margin is read and the padding never takes part. Averages of bytes
add up in 16 bits while ``kernel[0] * kernel[1] <= 256`` keeps that exact, else in 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    broadcast,
    constant,
    load,
    store,
    to_float,
    vector,
)
from graphopt.backends.cpu.epilogue import round_and_clamp
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import (
    Argument,
    View,
    activation_argument,
    build,
    fill_pad_channels,
    for_rows,
    kernel_name,
    sweep,
)
from graphopt.backends.cpu.workload import Pool2d
from graphopt.errors import CompileError

UNROLLED_TAPS = 25
EXACT_IN_16_BITS = 256
FLOAT_INFINITY = 0x7F800000  # a float32 whose magnitude, as an integer, is larger is a NaN


class _Span(NamedTuple):
    """Along one axis: where the window starts in the map, its first and last tap inside, the elements it counts."""

    start: Expr
    first: Expr
    stop: Expr
    counted: Expr
    inside: bool


@dataclass(frozen=True)
class _Axis:
    """One axis of the windows: ``start = position * stride - padding``."""

    extent: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def interior(self) -> tuple[int, int]:
        """The range of outputs whose whole window lies in the map."""
        reach = (self.kernel - 1) * self.dilation
        low = min(-(-self.padding // self.stride), self.outputs)
        high = (self.extent - 1 - reach + self.padding) // self.stride + 1
        return low, max(low, min(high, self.outputs))

    def span(self, position: Expr, inside: bool, include_padding: bool) -> _Span:
        start = bind(position * self.stride - self.padding)
        if inside:
            return _Span(start, 0, self.kernel, self.kernel, True)
        step = self.dilation
        first = bind(tirx.max(0, (step - 1 - start) // step))
        stop = bind(tirx.min(self.kernel, (self.extent + step - 1 - start) // step))
        counted = stop - first
        if include_padding:
            counted = tirx.min(start + self.kernel, self.extent + self.padding) - start
        return _Span(start, first, stop, bind(counted), False)


@dataclass(frozen=True)
class _Reduction:
    """``combine`` over the taps in elements of ``dtype``, ``finish(value, rows, columns, lanes)`` to the output."""

    dtype: str
    initial: float
    lanes: int
    combine: Callable[[Expr, Expr, int], Expr]
    finish: Callable[[Expr, _Span, _Span, int], Expr]
    spreads_nan: bool = False  # ``combine`` forgets a NaN that the result must be


def _maximum(workload: Pool2d, bits: int) -> _Reduction:
    dtype = workload.x.dtype
    lowest = {"uint8": 0, "int8": -128, "float32": float("-inf")}[dtype]
    width = 32 if dtype == "float32" else 8
    return _Reduction(
        dtype,
        lowest,
        bits // width,
        lambda a, b, _: tirx.max(a, b),
        lambda value, *_: value,
        spreads_nan=dtype == "float32",
    )


def _average(workload: Pool2d, bits: int, multipliers: Buffer) -> _Reduction:
    source, target = workload.x.dtype, workload.y.dtype
    rounding = workload.requantize
    if source == "float32":

        def divide(total: Expr, rows: _Span, columns: _Span, lanes: int) -> Expr:
            count = workload.divisor_override or rows.counted * columns.counted
            if isinstance(count, int):
                return total / constant("float32", count, lanes)
            divisor = tirx.Cast("float32", count)
            return total / broadcast(divisor, lanes)

        return _Reduction("float32", 0.0, bits // 32, lambda a, b, _: a + b, divide)

    narrow = workload.kernel[0] * workload.kernel[1] <= EXACT_IN_16_BITS
    dtype = ("uint16" if source == "uint8" else "int16") if narrow else "int32"

    def rescale(total: Expr, rows: _Span, columns: _Span, lanes: int) -> Expr:
        taps = (rows.stop - rows.first) * (columns.stop - columns.first)
        offset = tirx.Cast("int32", taps * workload.x_zero_point)
        multiplier = multipliers[rows.counted * columns.counted]
        centred = T.cast(total, vector("int32", lanes)) - broadcast(offset, lanes)
        scaled = to_float(centred, lanes) * broadcast(multiplier, lanes)
        if rounding is None:
            return scaled
        q = round_and_clamp(rounding, bind(scaled), lanes)
        return T.cast(q, vector(target, lanes))

    return _Reduction(
        dtype,
        0,
        bits // (16 if narrow else 32),
        lambda a, b, lanes: a + T.cast(b, vector(dtype, lanes)),
        rescale,
    )


def _axes(workload: Pool2d) -> tuple[_Axis, _Axis]:
    x, y = workload.x, workload.y
    extents, outputs = (x.height, x.width), (y.height, y.width)
    rows, columns = (
        _Axis(
            extents[axis],
            outputs[axis],
            workload.kernel[axis],
            workload.stride[axis],
            workload.padding[axis],
            workload.dilation[axis],
        )
        for axis in (0, 1)
    )
    return rows, columns


def _check(workload: Pool2d) -> None:
    if workload.kind not in ("max", "average"):
        raise CompileError(f'pool2d kind {workload.kind!r} is unknown; use "max" or "average".')
    if workload.kind == "max":
        return
    if workload.dilation != (1, 1):
        raise CompileError("average pooling has no dilation; leave it (1, 1).")
    rounds = workload.x.dtype != "float32" and workload.y.dtype != "float32"
    if rounds and workload.requantize is None:
        raise CompileError("integer average pooling must round; set requantize on the workload.")
    if not rounds and workload.requantize is not None:
        raise CompileError("an average to or from float32 is not rounded; leave requantize None.")


def pool2d(workload: Pool2d, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, y)``, or ``(x, multipliers, y)`` for an integer average; ``CompileError`` on a bad workload."""
    _check(workload)
    x, y, bits = workload.x, workload.y, 8 * isa.vector_bytes
    integer_average = workload.kind == "average" and x.dtype != "float32"
    table = Argument("multipliers", (workload.kernel[0] * workload.kernel[1] + 1,), "float32")
    arguments = (
        activation_argument("x", x),
        *((table,) if integer_average else ()),
        activation_argument("y", y),
    )
    key = replace(workload, x=replace(x, fill=0))
    legible = f"{workload.kernel[0]}x{workload.kernel[1]}_{x.height}x{x.width}x{x.channels}"
    name = kernel_name(f"{workload.kind}_pool", legible, key, isa.name, threads)
    vertical, horizontal = _axes(workload)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        source, target = View(x, flats[0], batch), View(y, flats[-1], batch)
        if workload.kind == "max":
            reduction = _maximum(workload, bits)
        else:
            reduction = _average(workload, bits, flats[1])

        def pixel(image: Expr, row: Expr, column: Expr, rows: _Span, inside: bool) -> None:
            columns = horizontal.span(column, inside, workload.count_include_pad)
            base = bind(target.at(image, row, column))

            def emit(channel: Expr, lanes: int) -> None:
                value = _reduce(workload, source, reduction, image, rows, columns, channel, lanes)
                target.store(base + channel, reduction.finish(value, rows, columns, lanes))

            sweep(y.channels, reduction.lanes, emit)
            fill_pad_channels(target, base, bits // 8)

        def line(image: Expr, row: Expr, inside: bool) -> None:
            rows = vertical.span(row, inside, workload.count_include_pad)
            low, high = horizontal.interior if inside else (0, 0)
            for start, stop, within in ((0, low, False), (low, high, True), (high, y.width, False)):
                if start < stop:
                    with T.serial(start, stop) as column:
                        pixel(image, row, column, rows, inside and within)

        def each(image: Expr, row: Expr) -> None:
            low, high = vertical.interior
            if (low, high) == (0, y.height):
                line(image, row, True)
                return
            if low == high:
                line(image, row, False)
                return
            with T.If(tirx.all(row >= low, row < high)):
                with T.Then():
                    line(image, row, True)
                with T.Else():
                    line(image, row, False)

        for_rows(target, bits // 8, threads, each)

    return build(name, arguments, body)


def _reduce(
    workload: Pool2d,
    x: View,
    reduction: _Reduction,
    image: Expr,
    rows: _Span,
    columns: _Span,
    channel: Expr,
    lanes: int,
) -> Expr:
    """The reduction over one window: unrolled where it is small and inside, else two loops around an accumulator."""
    (kernel_height, kernel_width), (down, right) = workload.kernel, workload.dilation
    initial = constant(reduction.dtype, reduction.initial, lanes)
    corner = bind(x.at(image, rows.start, columns.start, channel))
    line = x.layout.columns * x.layout.channel_stride

    def tap(r: Expr, s: Expr) -> Expr:
        offset = corner + r * down * line + s * right * x.layout.channel_stride
        return bind(x.load(offset, lanes))

    held = T.alloc_buffer((lanes,), reduction.dtype)
    store(held, 0, initial)
    magnitude = T.alloc_buffer((lanes,), "int32") if reduction.spreads_nan else None
    if magnitude is not None:
        store(magnitude, 0, constant("int32", 0, lanes))

    def visit(r: Expr, s: Expr) -> None:
        value = tap(r, s)
        store(held, 0, reduction.combine(load(held, 0, lanes), value, lanes))
        if magnitude is not None:
            # As integers, so that no chain of compares and blends waits for the maximum: 0.5x.
            bits = T.reinterpret(vector("int32", lanes), value)
            largest = tirx.max(
                load(magnitude, 0, lanes), bits & constant("int32", 0x7FFFFFFF, lanes)
            )
            store(magnitude, 0, largest)

    if rows.inside and columns.inside and kernel_height * kernel_width <= UNROLLED_TAPS:
        for r, s in product(range(kernel_height), range(kernel_width)):
            visit(r, s)
    else:
        with T.serial(rows.first, rows.stop) as r, T.serial(columns.first, columns.stop) as s:
            visit(r, s)
    value = bind(load(held, 0, lanes))
    if magnitude is None:
        return value
    is_nan = load(magnitude, 0, lanes) > constant("int32", FLOAT_INFINITY, lanes)
    return bind(tirx.Select(is_nan, constant("float32", float("nan"), lanes), value))


def pack_pool2d(workload: Pool2d, multiplier: float) -> list[npt.NDArray[np.float32]]:
    """The table of an integer average: entry ``count`` is ``float32(float64(multiplier) / count)``, entry 0 is 0.

    With ``divisor_override`` every entry divides by that instead; other pools take no table.
    """
    if workload.kind == "max" or workload.x.dtype.startswith("float"):
        return []
    counts = np.arange(workload.kernel[0] * workload.kernel[1] + 1, dtype=np.float64)
    if workload.divisor_override:
        counts[:] = workload.divisor_override
    table = np.zeros(counts.size, dtype=np.float64)
    np.divide(np.float64(multiplier), counts, out=table, where=counts != 0)
    return [table.astype(np.float32)]
