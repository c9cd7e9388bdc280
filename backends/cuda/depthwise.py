"""Depthwise int8 convolution: a thread makes ``COLUMNS`` neighbouring pixels of four channels, a row of taps unrolled.

Tensor cores have nothing to gain here: an output takes 9 or 25 products, and memory is the limit. Pixels of one thread share
the columns that their windows have in common, and every weight.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.epilogue import finish, int32
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.stream import (
    accumulators,
    group_of,
    load_group,
    store_group,
    vector,
)

COLUMNS = 4
GROUP = 4
THREADS = 128


def is_depthwise(workload: Conv2d) -> bool:
    """True where every output channel reads the input channel of its own number."""
    return workload.groups == workload.x.channels == workload.y.channels


def depthwise(workload: Conv2d) -> PrimFunc:
    """The kernel ``(x, weight, bias, multiplier, [residual], y)`` of packed constants; see ``pack_depthwise``."""
    x, y = workload.x, workload.y
    channels = -(-y.channels // GROUP) * GROUP
    taps = workload.kernel[0] * workload.kernel[1]
    arguments = [
        activation("x", x),
        Argument("weight", (taps * channels,), "int8"),
        Argument("bias", (channels,), "int32"),
        Argument("multiplier", (channels,), "float32"),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    key = replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))
    shape = f"{y.height}x{y.width}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    name = kernel_name("cuda_depthwise", shape, key)
    return build(
        name, arguments, lambda batch, flats: _Strip(workload, flats, channels).emit(batch)
    )


class _Strip:
    def __init__(self, workload: Conv2d, flats: list[Buffer], channels: int) -> None:
        self.workload, self.channels = workload, channels
        self.x, self.y = View(workload.x, flats[0]), View(workload.y, flats[-1])
        self.weight, self.bias, self.multiplier = flats[1:4]
        self.residual = None if workload.residual is None else View(workload.residual, flats[4])

    def emit(self, batch: Expr) -> None:
        w = self.workload
        strips = -(-w.y.width // COLUMNS)
        total = batch * (w.y.height * strips * (self.channels // GROUP))
        with (
            T.launch_thread("blockIdx.x", ceil_div(total, THREADS)) as block,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            index = bind(block * THREADS + thread)
            with T.If(index < total), T.Then():
                image, row, strip, part = split(index, w.y.height, strips, self.channels // GROUP)
                self.channel = bind(part * GROUP)
                self.first = bind(strip * COLUMNS)
                self.sums = accumulators(COLUMNS * GROUP, "int32", 0)
                with T.serial(0, w.kernel[0]) as tap_row:
                    self._row_of_taps(image, row, tap_row)
                self._store(bind((image * w.y.height + row) * w.y.width + self.first))

    def _row_of_taps(self, image: Expr, row: Expr, tap_row: Expr) -> None:
        w, (_, kernel_width) = self.workload, self.workload.kernel
        line = bind(row * w.stride[0] - w.padding[0] + tap_row * w.dilation[0])
        left = bind(self.first * w.stride[1] - w.padding[1])
        inside = bind(tirx.all(line >= 0, line < w.x.height))
        weights = T.alloc_buffer((kernel_width * GROUP,), "int8", scope="local")
        for tap in range(kernel_width):
            place = (tap_row * kernel_width + tap) * self.channels + self.channel
            value = self.weight.vload(place, vector("int8", GROUP))
            T.add_to_parent(weights.vstore(tap * GROUP, value))
        uses: dict[int, list[tuple[int, int]]] = {}  # column of x -> (output, tap)
        for output in range(COLUMNS):
            for tap in range(kernel_width):
                column = output * w.stride[1] + tap * w.dilation[1]
                uses.setdefault(column, []).append((output, tap))
        for column, products in sorted(uses.items()):
            values = self._load(bind(image * w.x.height + line), inside, bind(left + column))
            for output, tap in products:
                for i in range(GROUP):
                    product = values[i] * T.cast(weights[tap * GROUP + i], "int32")
                    place = output * GROUP + i
                    T.buffer_store(self.sums, self.sums[place] + product, [place])

    def _load(self, line: Expr, inside: Expr, column: Expr) -> list[Expr]:
        """Four channels of a pixel, the zero point outside the map."""
        w = self.workload
        dtype = w.x.dtype
        values = T.alloc_buffer((GROUP,), dtype, scope="local")
        there = tirx.all(inside, column >= 0, column < w.x.width)
        with T.If(there):
            with T.Then():
                place = self.x.at(line * w.x.width + column, self.channel)
                T.add_to_parent(values.vstore(0, self.x.flat.vload(place, vector(dtype, GROUP))))
            with T.Else():
                for i in range(GROUP):
                    T.buffer_store(values, tirx.const(w.x_zero_point, dtype), [i])
        return [bind(T.cast(values[i], "int32")) for i in range(GROUP)]

    def _store(self, pixel: Expr) -> None:
        w = self.workload
        bias = [bind(self.bias[self.channel + i]) for i in range(GROUP)]
        multiplier = [bind(self.multiplier[self.channel + i]) for i in range(GROUP)]
        for output in range(COLUMNS):
            with T.If(self.first + output < w.y.width), T.Then():
                others: list[Expr] = [int32(0)] * GROUP
                if self.residual is not None:
                    others = load_group(self.residual, pixel + output, self.channel, GROUP)
                values = [
                    finish(
                        w.epilogue,
                        self.sums[output * GROUP + i] + bias[i],
                        multiplier[i],
                        others[i],
                    )
                    for i in range(GROUP)
                ]
                self._store_values(bind(pixel + output), values)

    def _store_values(self, pixel: Expr, values: list[Expr]) -> None:
        """Four channels of y, or those that it has: floats do not stand in fours."""
        layout = self.workload.y
        if group_of(layout) == GROUP:
            store_group(self.y, pixel, self.channel, values)
            return
        for i, value in enumerate(values):
            with T.If(self.channel + i < layout.channels), T.Then():
                T.buffer_store(self.y.flat, value, [self.y.at(pixel, self.channel + i)])
