"""Kernels that stream activations: flat views, output rows with margins, vectors with an overlapping tail.

Every kernel here reads and writes through ``View.flat``, the tensor as one row of elements; the function's own
arguments keep the shape of the layout. A run of ``extent`` elements is swept by full vectors and a last vector that
ends exactly at ``extent`` and overlaps its neighbour: no scalar tail, and nothing outside the run is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    constant,
    flat,
    kernel,
    load,
    minimum,
    store,
)
from graphopt.backends.cpu.workload import Layout

Emit = Callable[[Expr, int], None]

UNROLLED_STEPS = 4


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel: its name, shape (None for the shared dynamic batch) and element type.

    Where it is ``unaligned`` its data begins at any element, elsewhere at a multiple of 64 bytes.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    unaligned: bool = False


@dataclass(frozen=True)
class View:
    """An activation as one row of elements, addressed by its logical position."""

    layout: Layout
    flat: Buffer
    batch: Expr
    order: str = "nhwc"

    def at(self, image: Expr, row: Expr, column: Expr = 0, channel: Expr = 0) -> Expr:
        """Offset of a logical position; a position in the margins is reached by a negative or an overlong index."""
        layout = self.layout
        if self.order == "nchw":
            line = (image * layout.channels + channel) * layout.height + row
            return line * layout.width + column
        line = image * layout.rows + (row + layout.top)
        pixel = line * layout.columns + (column + layout.left)
        return pixel * layout.channel_stride + layout.first_channel + channel

    def margin(self, image: Expr, row: Expr, column: Expr) -> Expr:
        """Offset of a position in the margins: the first channel in memory, whosever it is."""
        return self.at(image, row, column, -self.layout.first_channel)

    def load(self, offset: Expr, lanes: int) -> Expr:
        """``lanes`` neighbouring elements (a scalar where ``lanes`` is 1)."""
        return load(self.flat, offset, lanes)

    def store(self, offset: Expr, value: Expr) -> None:
        """Write the elements of a vector side by side."""
        store(self.flat, offset, value)


def activation_argument(name: str, layout: Layout, order: str = "nhwc") -> Argument:
    """The parameter that holds an activation of ``layout``."""
    if order == "nchw":
        shape = (layout.batch, layout.channels, layout.height, layout.width)
    else:
        shape = (layout.batch, *layout.shape)
    return Argument(name, shape, layout.dtype)


def kernel_name(kind: str, legible: str, *shaping: object) -> str:
    """``kind_legible_hash``: the hash covers everything that shapes the code."""
    digest = hashlib.sha256(repr(shaping).encode()).hexdigest()[:8]
    return f"{kind}_{legible}_{digest}"


def build(
    name: str, arguments: Sequence[Argument], body: Callable[[Expr, list[Buffer]], None]
) -> PrimFunc:
    """A ``PrimFunc`` whose ``body(batch, flat buffers)`` emits statements; a None in a shape is the dynamic batch."""
    dynamic = tirx.Var("batch", "int64")
    with kernel(name) as builder:
        buffers = []
        for argument in arguments:
            shape = tuple(dynamic if size is None else size for size in argument.shape)
            align = tvm.DataType(argument.dtype).itemsize if argument.unaligned else 0
            buffers.append(T.arg(argument.name, T.buffer(shape, argument.dtype, align=align)))
        leading = arguments[-1].shape[0]
        body(dynamic if leading is None else leading, [flat(buffer) for buffer in buffers])
    return builder.get()


def sweep(extent: int, lanes: int, emit: Emit) -> None:
    """Call ``emit(offset, lanes)`` so that vectors cover ``[0, extent)``; the last one may overlap the one before."""
    lanes = min(lanes, 1 << (extent.bit_length() - 1))
    steps = extent // lanes
    if steps <= UNROLLED_STEPS:
        for step in range(steps):
            emit(step * lanes, lanes)
    else:
        with T.serial(0, steps) as step:
            emit(step * lanes, lanes)
    if extent % lanes:
        emit(extent - lanes, lanes)


def fill(view: View, offset: Expr, count: int, vector_bytes: int) -> None:
    """Write the layout's fill into ``count`` elements from ``offset`` on."""
    if count == 0:
        return
    layout = view.layout
    width = vector_bytes // (4 if layout.dtype == "float32" else 1)
    base = bind(offset)
    sweep(
        count,
        width,
        lambda step, lanes: view.store(base + step, constant(layout.dtype, layout.fill, lanes)),
    )


def fill_pad_channels(view: View, pixel: Expr, vector_bytes: int) -> None:
    """Write the fill behind the last channel of the pixel that starts at ``pixel``."""
    layout = view.layout
    fill(view, pixel + layout.channels, layout.pad_channels, vector_bytes)


def for_rows(
    y: View,
    vector_bytes: int,
    threads: int,
    body: Callable[[Expr, Expr], None],
    rows: int = 1,
) -> None:
    """Run ``body(image, row)`` for every ``rows`` logical rows of ``y`` and write the fill into all four margins.

    Where ``rows`` does not divide the height, the last call starts early and repeats rows of the one before.
    """
    layout = y.layout
    line = layout.columns * layout.channel_stride
    groups = -(-layout.height // rows)
    loop = T.parallel if threads > 1 and (layout.batch, groups) != (1, 1) else T.serial

    def beside(image: Expr, row: Expr) -> None:
        stride = layout.channel_stride
        fill(y, y.margin(image, row, -layout.left), layout.left * stride, vector_bytes)
        fill(y, y.margin(image, row, layout.width), layout.right * stride, vector_bytes)

    with loop(0, y.batch * groups) as index:
        image, group = bind(index // groups), bind(index % groups)
        row = bind(minimum(group * rows, layout.height - rows))
        if layout.top:
            with T.If(group == 0), T.Then():
                edge = y.margin(image, -layout.top, -layout.left)
                fill(y, edge, layout.top * line, vector_bytes)
        for offset in range(rows):
            beside(image, row + offset)
        body(image, row)
        if layout.bottom:
            with T.If(group == groups - 1), T.Then():
                edge = y.margin(image, layout.height, -layout.left)
                fill(y, edge, layout.bottom * line, vector_bytes)


def elementwise(
    inputs: Sequence[View],
    y: View,
    lanes: int,
    vector_bytes: int,
    threads: int,
    expression: Callable[[list[Expr], int], Expr],
) -> None:
    """``y = expression(inputs)`` element by element; an input of height and width 1 is repeated over the map."""
    layout = y.layout
    repeated = [(v.layout.height, v.layout.width) != (layout.height, layout.width) for v in inputs]
    gapless = all(v.layout.channel_stride == layout.channels for v in (*inputs, y))
    rowwise = gapless and not any(repeated)
    run = layout.width * layout.channels if rowwise else layout.channels

    def cover(image: Expr, row: Expr, column: Expr) -> None:
        sources = [
            bind(view.at(image, 0, 0) if still else view.at(image, row, column))
            for view, still in zip(inputs, repeated, strict=True)
        ]
        target = bind(y.at(image, row, column))

        def emit(offset: Expr, width: int) -> None:
            pairs = zip(inputs, sources, strict=True)
            values = [bind(view.load(source + offset, width)) for view, source in pairs]
            y.store(target + offset, expression(values, width))

        sweep(run, lanes, emit)
        fill_pad_channels(y, target, vector_bytes)

    def body(image: Expr, row: Expr) -> None:
        if rowwise:
            cover(image, row, tirx.const(0, "int32"))
            return
        with T.serial(0, layout.width) as column:
            cover(image, row, column)

    for_rows(y, vector_bytes, threads, body)
