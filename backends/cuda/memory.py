"""Tensors as kernels see them: arguments, flat views, where an element lies, how many bytes move at once.

Activations are NHWC without margins: a kernel tests where a window leaves the map, which costs a GPU less than the margins
that CPU kernels write. Channels stand in groups of four bytes; **those that a layout lacks may hold anything**.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind, kernel
from graphopt.backends.cpu.stream import Argument
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.cuda.products import item_bytes
from graphopt.errors import CompileError

WIDEST = 16  # bytes of one memory instruction
INDEX_LIMIT = 2**31  # kernels number elements in int32


def activation(name: str, layout: Layout, order: str = "nhwc") -> Argument:
    """The parameter that holds an activation. Raises CompileError for a form that no kernel of this folder reads."""
    if layout.top or layout.bottom or layout.left or layout.right or layout.order != "nhwc":
        raise CompileError(f"a CUDA kernel takes maps without margins in NHWC order, not {layout}")
    if order == "nchw":
        shape = (layout.batch, layout.channels, layout.height, layout.width)
    else:
        shape = (layout.batch, *layout.shape)
    return Argument(name, shape, layout.dtype)


def build(
    name: str, arguments: Sequence[Argument], body: Callable[[Expr, list[Buffer]], None]
) -> PrimFunc:
    """A ``PrimFunc`` whose ``body(batch, flat buffers)`` launches the threads; a None in a shape is the dynamic batch."""
    dynamic = tirx.Var("batch", "int32")
    with kernel(name) as builder:
        buffers = []
        for argument in arguments:
            shape = tuple(dynamic if size is None else size for size in argument.shape)
            buffers.append(T.arg(argument.name, T.buffer(shape, argument.dtype)))
        leading = arguments[-1].shape[0]
        flats = []
        for buffer in buffers:
            size: Expr = 1
            for extent in buffer.shape:
                size = size * extent
            flats.append(T.decl_buffer((size,), buffer.dtype, data=buffer.data))
        body(dynamic if leading is None else leading, flats)
    return builder.get()


@dataclass(frozen=True)
class View:
    """An activation as one row of elements, addressed by pixel (``(image * H + row) * W + column``) and channel."""

    layout: Layout
    flat: Buffer

    def at(self, pixel: Expr, channel: Expr = 0) -> Expr:
        return pixel * self.layout.channel_stride + self.layout.first_channel + channel

    @property
    def stored_channels(self) -> int:
        return stored_channels(self.layout)


def stored_channels(layout: Layout) -> int:
    """Channels of a pixel that a kernel may touch: those up to the next tensor's, in whole groups."""
    return layout.channels if layout.shared else layout.channel_stride


def access(*layouts: Layout) -> int:
    """Elements that one instruction may move in all of these: a power of two, 16 bytes at most."""
    sizes = [WIDEST // item_bytes(layout.dtype) for layout in layouts]
    for layout in layouts:
        sizes += [stored_channels(layout), layout.channel_stride, layout.first_channel]
    return math.gcd(*sizes) if sizes else 1


def split(index: Expr, *extents: int) -> list[Expr]:
    """Coordinates of a flat index: the leading one may be of any extent, ``extents`` are of those behind it."""
    coordinates: list[Expr] = []
    for extent in reversed(extents):
        coordinates.append(tirx.floormod(index, extent) if extent > 1 else 0)
        index = tirx.floordiv(index, extent) if extent > 1 else index
    return [bind(value) for value in (index, *reversed(coordinates))]


def ceil_div(a: Expr, b: int) -> Expr:
    return -(-a // b) if isinstance(a, int) else tirx.floordiv(a + (b - 1), b)
