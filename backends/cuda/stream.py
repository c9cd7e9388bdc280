"""Kernels of which a thread makes one group of neighbouring channels of a pixel: the launch, loads and stores of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.cuda.memory import View, ceil_div, split, stored_channels

THREADS = 256
GROUP = 4  # elements of a group, where every tensor has whole ones


def group_of(*layouts: Layout) -> int:
    """Elements that one thread takes of each of these: 4, 2 or 1, as they lie."""
    sizes = [GROUP]
    for layout in layouts:
        sizes += [stored_channels(layout), layout.channel_stride, layout.first_channel]
    return math.gcd(*sizes)


@dataclass(frozen=True)
class Place:
    """Where a thread works: a pixel of the whole batch, the same as image, row, column, and its first channel."""

    pixel: Expr
    image: Expr
    row: Expr
    column: Expr
    channel: Expr


def each_group(
    batch: Expr,
    y: View,
    group: int,
    body: Callable[[Place], None],
    pixels_first: bool = False,
    read: Sequence[Layout] = (),
) -> None:
    """Launch a thread for every group of channels that y stores, and all that are ``read``: others' pad channels may lie nowhere.

    Neighbouring threads take neighbouring channels, or pixels where ``pixels_first``: what is contiguous on the strided side.
    """
    layout = y.layout
    groups = min(map(stored_channels, (layout, *read))) // group
    pixels = batch * (layout.height * layout.width)
    total = pixels * groups
    with (
        T.launch_thread("blockIdx.x", ceil_div(total, THREADS)) as block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        index = bind(block * THREADS + thread)
        with T.If(index < total), T.Then():
            if pixels_first:
                pixel = bind(tirx.floormod(index, pixels))
                part = bind(tirx.floordiv(index, pixels))
            else:
                pixel, part = split(index, groups)
            image, row, column = split(pixel, layout.height, layout.width)
            body(Place(pixel, image, row, column, bind(part * group)))


def vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def load_group(view: View, pixel: Expr, channel: Expr, group: int) -> list[Expr]:
    """The elements of a group, by one instruction."""
    values = T.alloc_buffer((group,), view.layout.dtype, scope="local")
    place = view.at(pixel, channel)
    T.add_to_parent(values.vstore(0, view.flat.vload(place, vector(view.layout.dtype, group))))
    return [values[i] for i in range(group)]


def store_group(view: View, pixel: Expr, channel: Expr, elements: Sequence[Expr]) -> None:
    """Write the elements of a group, cast to the tensor's type, by one instruction."""
    dtype, group = view.layout.dtype, len(elements)
    values = T.alloc_buffer((group,), dtype, scope="local")
    for i, element in enumerate(elements):
        T.buffer_store(values, T.cast(element, dtype), [i])
    place = view.at(pixel, channel)
    T.add_to_parent(view.flat.vstore(place, values.vload(0, vector(dtype, group))))


def accumulators(count: int, dtype: str, initial: float) -> Buffer:
    """Registers of one thread."""
    buffer = T.alloc_buffer((count,), dtype, scope="local")
    for i in range(count):
        T.buffer_store(buffer, tirx.const(initial, dtype), [i])
    return buffer
