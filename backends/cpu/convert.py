"""Change of layout, element type or both: the borders of a network and of its float islands.

Quantize ``q = zero_point + rint(clamp(v * inverse_scale, ...))``, dequantize ``v = float32(q - zero_point) * scale``,
requantize ``q' = zero_point' + rint(clamp(float32(q - zero_point) * multiplier, ...))``, or a plain copy; each of them
between "nhwc" with margins and dense "nchw". Across the two orders, four channels of a vector of pixels are transposed
by shuffles and written as one group a pixel; with up to four channels whole pixels are written back to back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.activation import apply_activation
from graphopt.backends.cpu.emit import Buffer, Expr, bind, constant, loop, to_float, vector
from graphopt.backends.cpu.epilogue import round_and_clamp
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import (
    View,
    activation_argument,
    build,
    elementwise,
    fill_pad_channels,
    for_rows,
    kernel_name,
    sweep,
)
from graphopt.backends.cpu.workload import Convert, Layout
from graphopt.errors import CompileError

GROUP = 4

Map = Callable[[Expr, int], Expr]


def _map(workload: Convert) -> Map:
    """The element-wise function, on vectors of the input's element type."""
    source, target = workload.x.dtype, workload.y.dtype

    def apply(value: Expr, lanes: int) -> Expr:
        if source == target and workload.requantize is None and workload.activation is None:
            return value
        if source == "float32":
            value = apply_activation(workload.activation, value, lanes)
        if source == target == "float32":
            return value
        scale = constant("float32", workload.scale, lanes)
        if source != "float32":
            zero_point = constant("int32", workload.x_zero_point, lanes)
            value = to_float(T.cast(value, vector("int32", lanes)) - zero_point, lanes)
        scaled = value * scale
        if workload.requantize is None:
            return apply_activation(workload.activation, scaled, lanes)
        q = round_and_clamp(workload.requantize, bind(scaled), lanes)
        return T.cast(q, vector(target, lanes))

    return apply


def _kind(workload: Convert) -> str:
    source, target = workload.x.dtype, workload.y.dtype
    if source == "float32":
        return "relayout" if target == "float32" else "quantize"
    if target == "float32":
        return "dequantize"
    return "relayout" if workload.requantize is None else "requantize"


def _check(workload: Convert) -> None:
    x, y = workload.x, workload.y
    if (x.batch, x.height, x.width, x.channels) != (y.batch, y.height, y.width, y.channels):
        raise CompileError(
            f"convert from {x} to {y} changes the logical shape; give both layouts the same "
            "batch, height, width and channels."
        )
    if y.dtype != "float32" and x.dtype != y.dtype and workload.requantize is None:
        raise CompileError(
            f"convert from {x.dtype} to {y.dtype} has no rounding; set requantize on the workload."
        )
    for order, layout in ((workload.x_order, x), (workload.y_order, y)):
        if order == "nchw" and not layout.is_dense:
            raise CompileError(f"convert: {layout} is nchw and has margins; make it dense.")


def _same_order(layout: Layout) -> Layout:
    """An nchw tensor read as nhwc: the axes C, H, W in the places of H, W, C."""
    return Layout(layout.batch, layout.channels, layout.height, layout.width, layout.dtype)


def _flat_map(layout: Layout) -> Layout:
    """All pixels of an image in one row (only for a layout without margins)."""
    return replace(layout, height=1, width=layout.height * layout.width)


def _shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    return tirx.Shuffle(list(vectors), list(indices))


def _for_groups(channels: int, group: Callable[[Expr, int], None]) -> None:
    """``GROUP`` channels at a time; the last group overlaps the one before rather than being narrower."""
    if channels <= GROUP:
        group(0, channels)
        return
    with loop(channels // GROUP) as index:
        group(index * GROUP, GROUP)
    if channels % GROUP:
        group(channels - GROUP, GROUP)


def _to_nhwc(workload: Convert, x: View, y: View, lanes: int, bits: int, threads: int) -> None:
    """Rows of pixels, ``lanes`` at a time: a vector a channel in, groups of channels a pixel out."""
    layout, apply = y.layout, _map(workload)
    channels, stride = layout.channels, layout.channel_stride
    packed = channels <= GROUP and stride <= GROUP and not layout.shared

    def body(image: Expr, row: Expr) -> None:
        def emit(column: Expr, width: int) -> None:
            target = bind(y.at(image, row, column))

            def group(start: Expr, count: int) -> None:
                values = [
                    bind(apply(bind(x.load(x.at(image, row, column, start + k), width)), width))
                    for k in range(count)
                ]
                size = stride if packed else len(values)
                values += [
                    constant(layout.dtype, layout.fill, width) for _ in range(size - len(values))
                ]
                if width == 1 or size == 1:
                    for offset, value in enumerate(values):
                        y.store(target + start + offset, value)
                elif packed:
                    order = [k * width + pixel for pixel in range(width) for k in range(size)]
                    y.store(target, _shuffle(values, order))
                else:
                    for pixel in range(width):
                        order = [k * width + pixel for k in range(size)]
                        offset = target + pixel * stride + start
                        y.store(offset, _shuffle(values, order))

            _for_groups(channels, group)
            if not packed:
                for pixel in range(width):
                    fill_pad_channels(y, target + pixel * stride, bits // 8)

        sweep(layout.width, lanes, emit)

    for_rows(y, bits // 8, threads, body)


def _to_nchw(workload: Convert, x: View, y: View, lanes: int, bits: int, threads: int) -> None:
    """Rows of pixels, ``lanes`` at a time: groups of channels a pixel in, a vector a channel out."""
    layout, apply = x.layout, _map(workload)
    channels, stride = layout.channels, layout.channel_stride
    packed = channels <= GROUP and stride <= GROUP and not layout.shared

    def body(image: Expr, row: Expr) -> None:
        def emit(column: Expr, width: int) -> None:
            source = bind(x.at(image, row, column))

            def group(start: Expr, count: int) -> None:
                if packed:
                    size, vectors = stride, [bind(x.load(source, stride * width))]
                else:
                    size = count
                    vectors = [
                        bind(x.load(source + pixel * stride + start, size))
                        for pixel in range(width)
                    ]
                for k in range(count):
                    order = [pixel * size + k for pixel in range(width)]
                    value = bind(vectors[0] if width * size == 1 else _shuffle(vectors, order))
                    y.store(y.at(image, row, column, start + k), apply(value, width))

            _for_groups(channels, group)

        sweep(layout.width, lanes, emit)

    rows = View(_same_rows(y.layout), y.flat, y.batch)
    for_rows(rows, bits // 8, threads, body)


def _same_rows(layout: Layout) -> Layout:
    """The map's rows without channels: what ``for_rows`` walks over for an nchw output."""
    return Layout(layout.batch, layout.height, layout.width, 1, layout.dtype)


def convert(workload: Convert, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, y)`` of a ``Convert`` workload; raises ``CompileError`` on a workload that is none."""
    _check(workload)
    x, y = workload.x, workload.y
    key = replace(workload, x=replace(x, fill=0))
    legible = f"{x.height}x{x.width}x{x.channels}_{workload.x_order}_{workload.y_order}"
    name = kernel_name(_kind(workload), legible, key, isa.name, threads)
    arguments = (
        # It may be the caller's own array: NumPy's begin at multiples of 16 bytes.
        replace(activation_argument("x", x, workload.x_order), unaligned=True),
        activation_argument("y", y, workload.y_order),
    )
    bits, lanes = 8 * isa.vector_bytes, isa.lanes
    crossing = workload.x_order != workload.y_order

    def body(batch: Expr, flats: list[Buffer]) -> None:
        source, target = x, y
        if crossing and x.height * x.width > 1:
            if x.is_dense and y.is_dense and x.width < lanes:
                source, target = _flat_map(x), _flat_map(y)
            views = (
                View(source, flats[0], batch, workload.x_order),
                View(target, flats[1], batch, workload.y_order),
            )
            transpose = _to_nhwc if workload.y_order == "nhwc" else _to_nchw
            transpose(workload, *views, lanes, bits, threads)
            return
        if not crossing and workload.x_order == "nchw":
            source, target = _same_order(x), _same_order(y)
        views = View(source, flats[0], batch), View(target, flats[1], batch)
        copies = x.dtype == y.dtype and workload.requantize is None and x.dtype != "float32"
        elementwise(
            [views[0]],
            views[1],
            bits // 8 if copies else lanes,
            bits // 8,
            threads,
            lambda values, width: _map(workload)(values[0], width),
        )

    return build(name, arguments, body)
