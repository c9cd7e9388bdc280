"""Between NHWC and planar order: the borders of the sparse part of a network.

A pixel of 4 neighbouring planes is 16 bytes of NHWC whatever the element type: groups of 4 planes of a vector of pixels are
transposed by shuffles of 32-bit words.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind, load, loop, store, vector
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
from graphopt.backends.cpu.workload import Layout
from graphopt.errors import CompileError

_PLANES = 4


def planar(layout: Layout) -> Layout:
    """The same tensor in planar order."""
    return Layout(
        layout.batch, layout.height, layout.width, layout.channels, layout.dtype, order="planar"
    )


def as_map(layout: Layout) -> Layout:
    """A planar tensor's memory as an NHWC map of a line a plane, whatever stands in it."""
    planes, pixels, group = layout.shape
    return Layout(layout.batch, planes, pixels, group, layout.dtype)


class _Words:
    """A buffer as 32-bit words: bytes are loaded and stored by fours."""

    def __init__(self, buffer: Buffer, group: int) -> None:
        self.buffer = buffer
        self.group = group
        self.dtype = "float32" if group == 1 else "int32"

    def load(self, element: Expr, words: int) -> Expr:
        value = load(self.buffer, element, words * self.group)
        if self.group == 1:
            return bind(value)
        return bind(T.reinterpret(vector(self.dtype, words), value))

    def store(self, element: Expr, value: Expr, words: int) -> None:
        if self.group > 1:
            value = T.reinterpret(vector("uint8", words * self.group), value)
        store(self.buffer, element, value)


def _shuffle(vectors: list[Expr], lanes: int, order: list[int]) -> Expr:
    """Lanes of vectors of ``lanes`` each."""
    return vectors[0] if len(vectors) * lanes == 1 else bind(tirx.Shuffle(vectors, order))


class _Transposition:
    """Rows of pixels of the NHWC side, a vector of pixels by 4 planes at a time."""

    def __init__(self, nhwc: View, planar_layout: Layout, buffers: tuple[Buffer, Buffer]) -> None:
        self.nhwc = nhwc
        self.planar = planar_layout
        group = planar_layout.group
        self.group = group
        self.pixels, self.planes = (_Words(buffer, group) for buffer in buffers)

    def run(self, image: Expr, row: Expr, column: Expr, width: int, to_planar: bool) -> None:
        layout, group, stride = self.planar, self.group, self.nhwc.layout.channel_stride
        start = bind(self.nhwc.at(image, row, column))
        pixel = bind(row * layout.width + column)

        def block(first: Expr, count: int) -> None:
            planes = [
                bind(((image * layout.planes + first + k) * layout.plane_pixels + pixel) * group)
                for k in range(count)
            ]
            places = [bind(start + p * stride + first * group) for p in range(width)]
            if to_planar:
                values = [self.pixels.load(place, count) for place in places]
                for k, place in enumerate(planes):
                    order = [p * count + k for p in range(width)]
                    self.planes.store(place, _shuffle(values, count, order), width)
                return
            values = [self.planes.load(place, width) for place in planes]
            for p, place in enumerate(places):
                order = [k * width + p for k in range(count)]
                self.pixels.store(place, _shuffle(values, width, order), count)

        if layout.planes <= _PLANES:
            block(0, layout.planes)
            return
        with loop(layout.planes // _PLANES) as index:
            block(bind(index * _PLANES), _PLANES)
        if layout.planes % _PLANES:
            block(layout.planes - _PLANES, _PLANES)


def _planar_argument(name: str, layout: Layout) -> Argument:
    return Argument(name, (layout.batch, *layout.shape), layout.dtype)


def reorder(x: Layout, y: Layout, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, y)`` that changes the order alone: one of the layouts is planar, the other NHWC with margins."""
    to_planar = y.order == "planar"
    inner, outer = (y, x) if to_planar else (x, y)
    if outer.channel_stride % inner.group or outer.first_channel % inner.group:
        raise CompileError(f"reorder takes whole words of channels, not {outer}; pad its channels.")
    legible = f"{x.height}x{x.width}x{x.channels}_{'planar' if to_planar else 'nhwc'}"
    shaping = replace(x, fill=0), y
    name = kernel_name("reorder", legible, *shaping, isa.name, threads)
    arguments = (
        activation_argument("x", x) if to_planar else _planar_argument("x", x),
        _planar_argument("y", y) if to_planar else activation_argument("y", y),
    )
    # the planar side is walked over as the map's rows without channels or margins
    rows = Layout(y.batch, y.height, y.width, 1, y.dtype) if to_planar else y

    def body(batch: Expr, flats: list[Buffer]) -> None:
        nhwc, planes = (flats[0], flats[1]) if to_planar else (flats[1], flats[0])
        view = View(outer, nhwc, batch)
        step = _Transposition(view, inner, (nhwc, planes))

        def row_body(image: Expr, row: Expr) -> None:
            def pixels(column: Expr, width: int) -> None:
                step.run(image, row, column, width, to_planar)
                if not to_planar:
                    for p in range(width if y.pad_channels else 0):
                        fill_pad_channels(view, view.at(image, row, column + p), isa.vector_bytes)

            sweep(outer.width, isa.lanes, pixels)

        for_rows(View(rows, flats[1], batch), isa.vector_bytes, threads, row_body)

    return build(name, arguments, body)
