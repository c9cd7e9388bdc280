"""float32 convolution and linear: an implicit matrix product of tiles in shared memory, 8 x 8 or 4 x 4 outputs a thread.

A thread of 8 x 8 reads 16 numbers for 64 products, of 4 x 4 8 for 16; small layers have more blocks of those. TVM's schedules leave a convolution to one thread an output, which reads every weight from memory. The next tile is on its way
to registers while one is multiplied. Grouped and depthwise convolutions, with few products an output, are one thread's each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind, select
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.device import synchronize
from graphopt.backends.cuda.epilogue import apply_activation, float32, int32
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.stream import Place, accumulators, each_group

Array = np.ndarray[Any, Any]

THREADS = 256
QUAD = 4  # numbers of one load
_SIDE = 16  # threads along either side of a tile
_FEW_BLOCKS = 128  # of large tiles, below which tiles are small
_ASSUMED_BATCH = 8  # of a dynamic one
_HELD = "tirx.launch_bounds_min_blocks_per_sm"


@dataclass(frozen=True)
class Tile:
    """``side x side`` outputs of a block, ``part x part`` of them a thread's; ``step`` products between two barriers.

    ``held`` blocks share a multiprocessor, with 64 or 128 registers a thread: left alone the compiler takes 130 for the large
    tile, and one block waits by itself. A thread brings four numbers of x and of the weight a step. Its outputs are quads,
    ``side / (part / 4)`` apart: sixteen threads that read a quad each read a row without gaps.
    """

    side: int
    step: int
    held: int

    @property
    def part(self) -> int:
        return self.side // _SIDE

    @property
    def pitch(self) -> int:
        """From a row in shared memory to the next, against bank conflicts."""
        return self.side + QUAD

    def quads(self, thread: Expr) -> list[Expr]:
        """The first of each quad of a thread, by its number along a side."""
        return [thread * QUAD + quad * _SIDE * QUAD for quad in range(self.part // QUAD)]


SMALL, LARGE = Tile(64, 16, 4), Tile(128, 8, 2)


def tile_of(workload: Conv2d) -> Tile:
    """The tile of a convolution that is not grouped."""
    y = workload.y
    rows = -(-(y.batch or _ASSUMED_BATCH) * y.height * y.width // LARGE.side)
    blocks = rows * -(-y.channels // LARGE.side)
    return LARGE if y.channels > SMALL.side and blocks >= _FEW_BLOCKS else SMALL


def pack_float(workload: Conv2d, weight: Array, bias: Array | None) -> list[Array]:
    """Weight OIHW as ``[k][output]`` (k = tap, channel), whole tiles of it where it is tiled, and the bias."""
    out, channels, height, width = weight.shape
    rows = weight.transpose(2, 3, 1, 0).reshape(height * width * channels, out)
    if workload.groups == 1:
        tile = tile_of(workload)
        depth, columns = (
            -(-n // size) * size for n, size in zip(rows.shape, (tile.step, tile.side), strict=True)
        )
        rows = np.pad(rows, ((0, depth - rows.shape[0]), (0, columns - out)))
    shift = np.zeros(out, np.float32) if bias is None else bias
    shift = np.pad(shift, (0, rows.shape[1] - out))
    return [np.ascontiguousarray(rows, np.float32).reshape(-1), shift.astype(np.float32)]


def float_conv(workload: Conv2d) -> PrimFunc:
    """The kernel ``(x, weight, bias, [residual], y)`` of packed constants; see ``pack_float``."""
    x, y = workload.x, workload.y
    depth = math.prod(workload.kernel) * (x.channels // workload.groups)
    tiled = workload.groups == 1
    tile = tile_of(workload)
    columns = -(-y.channels // tile.side) * tile.side if tiled else y.channels
    rows = -(-depth // tile.step) * tile.step if tiled else depth
    arguments = [
        activation("x", x),
        Argument("weight", (rows * columns,), "float32"),
        Argument("bias", (columns,), "float32"),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    shape = (
        f"{y.height}x{y.width}x{x.channels}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    )
    name = kernel_name(
        "cuda_float", shape, replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))
    )

    def body(batch: Expr, flats: list[Buffer]) -> None:
        if tiled:
            _Block(workload, flats, depth, columns).emit(batch)
        else:
            _Single(workload, flats).emit(batch)

    return build(name, arguments, body)


class _Layer:
    """What both forms share: where windows lie, and what follows the sum."""

    def __init__(self, workload: Conv2d, flats: list[Buffer]) -> None:
        self.workload = workload
        self.x, self.y = View(workload.x, flats[0]), View(workload.y, flats[-1])
        self.weight, self.bias = flats[1:3]
        self.residual = None if workload.residual is None else View(workload.residual, flats[3])

    def value(self, exists: Expr, pixel: Expr, row: Expr, column: Expr, channel: Expr) -> Expr:
        """An element of x, 0 outside the map; ``pixel`` counts through the whole batch."""
        x = self.workload.x
        inside = tirx.all(exists, row >= 0, row < x.height, column >= 0, column < x.width)
        element = self.x.flat[self.x.at(pixel, channel)]
        return bind(tirx.if_then_else(inside, element, float32(0.0)))

    def store(self, total: Expr, pixel: Expr, channel: Expr) -> None:
        value = total + self.bias[channel]
        if self.residual is not None:
            value = value + self.residual.flat[self.residual.at(pixel, channel)]
        result = apply_activation(self.workload.epilogue.activation, bind(value))
        T.buffer_store(self.y.flat, result, [self.y.at(pixel, channel)])


class _Single(_Layer):
    def emit(self, batch: Expr) -> None:
        each_group(batch, self.y, 1, self._output)

    def _output(self, at: Place) -> None:
        w = self.workload
        inputs, outputs = w.x.channels // w.groups, w.y.channels // w.groups
        first = bind(tirx.floordiv(at.channel, outputs) * inputs)
        total = accumulators(1, "float32", 0.0)
        with T.serial(0, w.kernel[0]) as i, T.serial(0, w.kernel[1]) as j:
            row = bind(at.row * w.stride[0] - w.padding[0] + i * w.dilation[0])
            column = bind(at.column * w.stride[1] - w.padding[1] + j * w.dilation[1])
            with T.serial(0, inputs) as k:
                pixel = (at.image * w.x.height + row) * w.x.width + column
                value = self.value(tirx.const(True, "bool"), pixel, row, column, first + k)
                tap = (i * w.kernel[1] + j) * inputs + k
                weight = self.weight[tap * w.y.channels + at.channel]
                T.buffer_store(total, total[0] + value * weight, [0])
        self.store(total[0], at.pixel, at.channel)


class _Block(_Layer):
    def __init__(self, workload: Conv2d, flats: list[Buffer], depth: int, columns: int) -> None:
        super().__init__(workload, flats)
        self.tile = tile_of(workload)
        self.depth, self.columns = depth, columns
        self.steps = -(-depth // self.tile.step)

    def emit(self, batch: Expr) -> None:
        w = self.workload
        self.pixels = batch * (w.y.height * w.y.width)
        side, size = self.tile.side, self.tile.step * self.tile.pitch
        across = self.columns // side
        with (
            T.launch_thread("blockIdx.x", ceil_div(self.pixels, side) * across) as block,
            T.launch_thread("threadIdx.x", THREADS) as thread,
            T.attr({_HELD: self.tile.held}),
        ):
            self.thread = thread
            self.first_column = bind(tirx.floormod(block, across) * side)
            self.first_pixel = bind(tirx.floordiv(block, across) * side)
            self.left = T.alloc_buffer((size,), "float32", scope="shared")
            self.right = T.alloc_buffer((size,), "float32", scope="shared")
            self.sums = accumulators(self.tile.part**2, "float32", 0.0)
            self._prepare()
            self._load(int32(0))
            with T.serial(0, self.steps) as step:
                self._put()
                synchronize()
                with T.If(step + 1 < self.steps), T.Then():
                    self._load(step + 1)
                self._multiply()
                synchronize()
            self._store()

    def _prepare(self) -> None:
        """Which of x this thread brings: one element of k for four pixels; and of the weight, four columns of one k."""
        w, tile = self.workload, self.tile
        self.row, self.column = split(self.thread, _SIDE)
        self.x_row, self.x_k = split(self.thread, tile.step)
        self.weight_k, quad = split(self.thread, tile.side // QUAD)
        self.weight_column = bind(quad * QUAD)
        self.windows = []
        for i in range(QUAD):
            pixel = bind(self.first_pixel + self.x_row + i * (THREADS // tile.step))
            image, row, column = split(pixel, w.y.height, w.y.width)
            down = row * w.stride[0] - w.padding[0]
            above = -w.kernel[0] * w.dilation[0]  # a row that no tap brings into the map
            top = bind(select(pixel < self.pixels, down, int32(above)))
            left = bind(column * w.stride[1] - w.padding[1])
            first = bind((image * w.x.height + top) * w.x.width + left)
            self.windows.append((first, top, left))
        self.next_left = T.alloc_buffer((QUAD,), "float32", scope="local")
        self.next_right = T.alloc_buffer((QUAD,), "float32", scope="local")

    def _load(self, step: Expr) -> None:
        w = self.workload
        k = bind(step * self.tile.step + self.x_k)
        tap_row, tap_column, channel = split(k, w.kernel[1], w.x.channels)
        down, right = bind(tap_row * w.dilation[0]), bind(tap_column * w.dilation[1])
        tap = bind(down * w.x.width + right)
        for i, (first, top, left) in enumerate(self.windows):
            place = top + down, left + right, channel
            value = self.value(k < self.depth, first + tap, *place)
            T.buffer_store(self.next_left, value, [i])
        line = bind((step * self.tile.step + self.weight_k) * self.columns + self.first_column)
        _move(self.next_right, 0, self.weight, line + self.weight_column)

    def _put(self) -> None:
        tile = self.tile
        for i in range(QUAD):
            place = self.x_k * tile.pitch + self.x_row + i * (THREADS // tile.step)
            T.buffer_store(self.left, self.next_left[i], [place])
        _move(self.right, self.weight_k * tile.pitch + self.weight_column, self.next_right, 0)

    def _multiply(self) -> None:
        part = self.tile.part
        a = T.alloc_buffer((part,), "float32", scope="local")
        b = T.alloc_buffer((part,), "float32", scope="local")
        sides = (a, self.left, self.row), (b, self.right, self.column)
        for k in range(self.tile.step):
            for registers, source, thread in sides:
                for i, quad in enumerate(self.tile.quads(thread)):
                    _move(registers, i * QUAD, source, k * self.tile.pitch + quad)
            for i in range(part):
                for j in range(part):
                    place = i * part + j
                    T.buffer_store(self.sums, self.sums[place] + a[i] * b[j], [place])

    def _store(self) -> None:
        part = self.tile.part
        rows, columns = self.tile.quads(self.row), self.tile.quads(self.column)
        for i in range(part):
            pixel = bind(self.first_pixel + rows[i // QUAD] + i % QUAD)
            for j in range(part):
                channel = bind(self.first_column + columns[j // QUAD] + j % QUAD)
                inside = tirx.all(pixel < self.pixels, channel < self.workload.y.channels)
                with T.If(inside), T.Then():
                    self.store(self.sums[i * part + j], pixel, channel)


def _move(target: Buffer, at: Expr, source: Buffer, start: Expr) -> None:
    """Four numbers by one load and one store."""
    T.add_to_parent(target.vstore(at, source.vload(start, f"float32x{QUAD}")))
