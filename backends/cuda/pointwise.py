"""Element by element in NHWC: sums, products, concatenation, changes of element type and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import kernel_name
from graphopt.backends.cpu.workload import Add, Concat, Convert, Layout, Mul
from graphopt.backends.cuda.device import multiply_float
from graphopt.backends.cuda.epilogue import (
    FLOATS,
    apply_activation,
    float32,
    int32,
    quantized_add,
    round_and_clamp,
    to_float,
)
from graphopt.backends.cuda.memory import View, activation, build
from graphopt.backends.cuda.stream import Place, each_group, group_of, load_group, store_group

Combine = Callable[[Expr, Expr], Expr]


def _no_fills(workload: Any) -> Any:
    """The workload without what no CUDA kernel reads, for its name."""
    layouts = {
        name: replace(value, fill=0)
        for name, value in vars(workload).items()
        if isinstance(value, Layout)
    }
    return replace(workload, **layouts)


def _legible(y: Layout) -> str:
    return f"{y.height}x{y.width}x{y.channels}"


def _binary(kind: str, workload: Add | Mul, combine: Combine) -> PrimFunc:
    a, b, y = workload.a, workload.b, workload.y
    one_value = (b.height, b.width) != (y.height, y.width)
    arguments = [activation(n, layout) for n, layout in (("a", a), ("b", b), ("y", y))]

    def body(batch: Expr, flats: list[Buffer]) -> None:
        left, right, result = (View(v, f) for v, f in zip((a, b, y), flats, strict=True))
        group = group_of(a, b, y)

        def emit(at: Place) -> None:
            xs = load_group(left, at.pixel, at.channel, group)
            ys = load_group(right, at.image if one_value else at.pixel, at.channel, group)
            values = [combine(p, q) for p, q in zip(xs, ys, strict=True)]
            store_group(result, at.pixel, at.channel, values)

        each_group(batch, result, group, emit, read=(a, b))

    return build(kernel_name(f"cuda_{kind}", _legible(y), _no_fills(workload)), arguments, body)


def add(workload: Add) -> PrimFunc:
    """The kernel ``(a, b, y)`` of a residual sum; floats of either type are added in float32."""
    parameters = workload.add

    def combine(a: Expr, b: Expr) -> Expr:
        if parameters is None:
            return apply_activation(workload.activation, to_float(a) + to_float(b))
        return quantized_add(parameters, T.cast(a, "int32"), T.cast(b, "int32"))

    return _binary("add", workload, combine)


def mul(workload: Mul) -> PrimFunc:
    """The kernel ``(a, b, y)`` of a float product; b has a's shape or one value a channel."""

    def combine(a: Expr, b: Expr) -> Expr:
        return apply_activation(workload.activation, to_float(a) * to_float(b))

    return _binary("mul", workload, combine)


def concat(workload: Concat) -> PrimFunc:
    """The kernel ``(x0, x1, ..., y)``; every thread finds the input that its channels are of."""
    y = workload.y
    arguments = [activation(f"x{i}", x) for i, x in enumerate(workload.inputs)]
    arguments.append(activation("y", y))
    key = replace(
        workload, inputs=tuple(replace(x, fill=0) for x in workload.inputs), y=replace(y, fill=0)
    )

    def body(batch: Expr, flats: list[Buffer]) -> None:
        views = [View(x, f) for x, f in zip(workload.inputs, flats[:-1], strict=True)]
        result = View(y, flats[-1])
        group = group_of(*workload.inputs, y)
        firsts = [sum(x.channels for x in workload.inputs[:i]) for i in range(len(views))]
        for first in firsts:
            while first % group:
                group //= 2

        def emit(at: Place) -> None:
            for view, first in zip(views, firsts, strict=True):
                last = first + view.layout.channels
                with T.If(tirx.all(at.channel >= first, at.channel < last)), T.Then():
                    values = load_group(view, at.pixel, at.channel - first, group)
                    store_group(result, at.pixel, at.channel, values)

        each_group(batch, result, group, emit)

    return build(kernel_name("cuda_concat", _legible(y), key), arguments, body)


def convert(workload: Convert) -> PrimFunc:
    """The kernel ``(x, y)``: quantize, dequantize, requantize, round or copy, from and to NHWC or dense NCHW."""
    x, y = workload.x, workload.y
    nchw = "nchw" in (workload.x_order, workload.y_order)
    arguments = [activation("x", x, workload.x_order), activation("y", y, workload.y_order)]
    apply = _map(workload)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        source, target = (
            _Ordered(x, flats[0], workload.x_order),
            _Ordered(y, flats[1], workload.y_order),
        )
        orders = ((x, workload.x_order), (y, workload.y_order))
        by_pixels = [layout for layout, order in orders if order == "nhwc"]
        group = group_of(*by_pixels)

        def emit(at: Place) -> None:
            values = source.load(at, group)
            target.store(at, [apply(value) for value in values])

        # in NCHW the channels beyond the last are nowhere: threads go by the channels of the NHWC side
        shaping = View(y if workload.y_order == "nhwc" else x, flats[1])
        each_group(batch, shaping, group, emit, pixels_first=nchw, read=by_pixels)

    name = kernel_name("cuda_convert", _legible(y), _no_fills(workload))
    return build(name, arguments, body)


def _map(workload: Convert) -> Callable[[Expr], Expr]:
    source, target = workload.x.dtype, workload.y.dtype

    def apply(value: Expr) -> Expr:
        if source == target and workload.requantize is None and workload.activation is None:
            return value
        if source in FLOATS:
            value = apply_activation(workload.activation, to_float(value))
            if target in FLOATS:
                return value
        else:
            value = to_float(T.cast(value, "int32") - int32(workload.x_zero_point))
        scaled = multiply_float(value, float32(workload.scale))
        if workload.requantize is None:
            return apply_activation(workload.activation, scaled)
        return round_and_clamp(workload.requantize, scaled)

    return apply


class _Ordered:
    """One side of a conversion: groups of channels in NHWC, or elements far apart in NCHW."""

    def __init__(self, layout: Layout, flat: Buffer, order: str) -> None:
        self.view = View(layout, flat)
        self.order = order

    def _place(self, at: Place, channel: Expr) -> Expr:
        layout = self.view.layout
        plane = (at.image * layout.channels + channel) * layout.height + at.row
        return plane * layout.width + at.column

    def load(self, at: Place, group: int) -> list[Expr]:
        if self.order == "nhwc":
            return load_group(self.view, at.pixel, at.channel, group)
        layout, found = self.view.layout, []
        for i in range(group):
            channel = bind(at.channel + i)
            element = self.view.flat[self._place(at, channel)]
            zero = tirx.const(0, layout.dtype)
            inside = channel < layout.channels
            found.append(bind(tirx.if_then_else(inside, element, zero)))
        return found

    def store(self, at: Place, values: list[Expr]) -> None:
        if self.order == "nhwc":
            store_group(self.view, at.pixel, at.channel, values)
            return
        for i, value in enumerate(values):
            channel = bind(at.channel + i)
            with T.If(channel < self.view.layout.channels), T.Then():
                element = T.cast(value, self.view.layout.dtype)
                T.buffer_store(self.view.flat, element, [self._place(at, channel)])
