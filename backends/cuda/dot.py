"""int8 convolution by ``dp4a``: grouped ones, and those of so few outputs that tiles of a tensor core would stay empty.

Neighbouring threads make neighbouring output channels, so that weights are read in whole lines. Where outputs are few, as in
a linear layer of one image, ``slices`` threads share an output's products and add up through shared memory.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.device import dot, synchronize
from graphopt.backends.cuda.epilogue import finish, int32
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split

COLUMNS = 32  # output channels of a block: a warp's lanes
ROWS = 4  # pixels of a block, where an output is one thread's
SLICES = 8  # threads of an output, where they are few
FEW_PIXELS = 16
GROUP = 4


def has_few_outputs(workload: Conv2d) -> bool:
    """True for so few pixels that a tile of 32 x 32 outputs would be half empty."""
    batch = workload.y.batch
    return batch is not None and batch * workload.y.height * workload.y.width <= FEW_PIXELS


def dot_conv(workload: Conv2d) -> PrimFunc:
    """The kernel ``(x, weight, bias, multiplier, [residual], y)`` of packed constants; see ``pack_dot``."""
    x, y = workload.x, workload.y
    words = _words(workload) * y.channels
    arguments = [
        activation("x", x),
        Argument("weight", (words,), "int32"),
        Argument("bias", (y.channels,), "int32"),
        Argument("multiplier", (y.channels,), "float32"),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    key = replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))
    shape = (
        f"{y.height}x{y.width}x{x.channels}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    )
    name = kernel_name("cuda_dot", shape, key)
    return build(name, arguments, lambda batch, flats: _Block(workload, flats).emit(batch))


def _words(workload: Conv2d) -> int:
    """Products of four that an output adds up."""
    quads = -(-(workload.x.channels // workload.groups) // GROUP)
    return workload.kernel[0] * workload.kernel[1] * quads


class _Block:
    def __init__(self, workload: Conv2d, flats: list[Buffer]) -> None:
        self.workload = workload
        self.x, self.y = View(workload.x, flats[0]), View(workload.y, flats[-1])
        self.weight, self.bias, self.multiplier = flats[1:4]
        self.residual = None if workload.residual is None else View(workload.residual, flats[4])
        self.slices = SLICES if has_few_outputs(workload) else 1
        self.rows = 1 if self.slices > 1 else ROWS

    def emit(self, batch: Expr) -> None:
        y = self.workload.y
        self.pixels = batch * (y.height * y.width)
        columns = ceil_div(y.channels, COLUMNS)
        with (
            T.launch_thread("blockIdx.x", ceil_div(self.pixels, self.rows) * columns) as block,
            T.launch_thread("threadIdx.x", COLUMNS * self.rows * self.slices) as thread,
        ):
            lane = bind(tirx.floormod(thread, COLUMNS))
            other = bind(tirx.floordiv(thread, COLUMNS))
            row, slice_ = (0, other) if self.slices > 1 else (other, 0)
            pixel = bind(tirx.floordiv(block, columns) * self.rows + row)
            channel = bind(tirx.floormod(block, columns) * COLUMNS + lane)
            exists = bind(tirx.all(pixel < self.pixels, channel < y.channels))
            total = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(total, int32(0), [0])
            with T.If(exists), T.Then():
                self._add_up(total, pixel, channel, slice_)
            if self.slices > 1:
                exists = self._add_slices(total, lane, slice_, exists)
            with T.If(exists), T.Then():
                self._store(total[0], pixel, channel)

    def _add_up(self, total: Buffer, pixel: Expr, channel: Expr, slice_: Expr) -> None:
        w = self.workload
        per_group = w.y.channels // w.groups
        inputs = w.x.channels // w.groups
        quads = -(-inputs // GROUP)
        words = _words(w)
        group, within = split(channel, per_group)
        image, row, column = split(pixel, w.y.height, w.y.width)
        top = bind(row * w.stride[0] - w.padding[0])
        left = bind(column * w.stride[1] - w.padding[1])
        with T.serial(0, -(-words // self.slices)) as step:
            word = bind(step * self.slices + slice_)
            with T.If(word < words), T.Then():
                tap_row, tap_column, quad = split(word, w.kernel[1], quads)
                line = bind(top + tap_row * w.dilation[0])
                position = bind(left + tap_column * w.dilation[1])
                place = bind((image * w.x.height + line) * w.x.width + position)
                inside = tirx.all(line >= 0, line < w.x.height, position >= 0, position < w.x.width)
                values = self._values(inside, place, group * inputs, quad, inputs)
                weight = self.weight[(group * words + word) * per_group + within]
                T.buffer_store(total, dot(values, weight, total[0], w.x.dtype), [0])

    def _values(self, inside: Expr, pixel: Expr, first: Expr, quad: Expr, inputs: int) -> Expr:
        """Four channels of a group as a word; zero points outside the map, anything past the last channel."""
        w = self.workload
        outside = w.x_zero_point & 0xFF
        padding = tirx.const(outside * 0x01010101, "uint32")
        channel = bind(first + quad * GROUP)
        if inputs % GROUP == 0 or w.groups == 1:
            word = T.reinterpret(
                "uint32", self.x.flat.vload(self.x.at(pixel, channel), f"{w.x.dtype}x4")
            )
            return bind(tirx.if_then_else(inside, word, padding))
        value = tirx.const(0, "uint32")
        for i in range(GROUP):
            exists = tirx.all(inside, quad * GROUP + i < inputs)
            element = self.x.flat[self.x.at(pixel, channel + i)]
            byte = T.cast(element, "uint32") & tirx.const(0xFF, "uint32")
            byte = tirx.if_then_else(exists, byte, tirx.const(outside, "uint32"))
            value = value | (byte << tirx.const(8 * i, "uint32"))
        return bind(value)

    def _add_slices(self, total: Buffer, lane: Expr, slice_: Expr, exists: Expr) -> Expr:
        """The sum of all slices in the first one's threads, which alone go on."""
        parts = T.alloc_buffer((self.slices * COLUMNS,), "int32", scope="shared")
        T.buffer_store(parts, total[0], [slice_ * COLUMNS + lane])
        synchronize()
        first = bind(tirx.all(exists, slice_ == 0))
        with T.If(first), T.Then():
            for i in range(1, self.slices):
                T.buffer_store(total, total[0] + parts[i * COLUMNS + lane], [0])
        return first

    def _store(self, total: Expr, pixel: Expr, channel: Expr) -> None:
        residual: Expr = int32(0)
        if self.residual is not None:
            residual = self.residual.flat[self.residual.at(pixel, channel)]
        value = bind(total + self.bias[channel])
        result = finish(self.workload.epilogue, value, self.multiplier[channel], residual)
        y = self.workload.y
        T.buffer_store(self.y.flat, T.cast(result, y.dtype), [self.y.at(pixel, channel)])
