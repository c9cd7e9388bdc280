"""float32 convolution and linear: an implicit matrix product of 64 x 64 tiles in shared memory, 4 x 4 outputs a thread.

TVM's schedules leave a convolution to one thread an output, which reads every weight from memory. The next tile is on its way
to registers while one is multiplied. Grouped and depthwise convolutions, with few products an output, are one thread's each.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.device import synchronize
from graphopt.backends.cuda.epilogue import apply_activation, float32, int32
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.stream import Place, accumulators, each_group

Array = np.ndarray[Any, Any]

TILE = 64  # outputs of a block along pixels, and along channels
STEP = 16  # products between two barriers
PART = 4  # outputs of a thread along each
THREADS = (TILE // PART) ** 2
_PITCH = TILE + 4  # a row of a tile in shared memory, against bank conflicts


def pack_float(workload: Conv2d, weight: Array, bias: Array | None) -> list[Array]:
    """Weight OIHW as ``[k][output]`` (k = tap, channel), whole tiles of it where it is tiled, and the bias."""
    out, channels, height, width = weight.shape
    rows = weight.transpose(2, 3, 1, 0).reshape(height * width * channels, out)
    if workload.groups == 1:
        depth, columns = (
            -(-n // size) * size for n, size in zip(rows.shape, (STEP, TILE), strict=True)
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
    columns = -(-y.channels // TILE) * TILE if tiled else y.channels
    steps = -(-depth // STEP)
    arguments = [
        activation("x", x),
        Argument("weight", ((steps * STEP if tiled else depth) * columns,), "float32"),
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

    def value(self, exists: Expr, image: Expr, row: Expr, column: Expr, channel: Expr) -> Expr:
        """An element of x, 0 outside the map."""
        x = self.workload.x
        inside = tirx.all(exists, row >= 0, row < x.height, column >= 0, column < x.width)
        element = self.x.flat[self.x.at((image * x.height + row) * x.width + column, channel)]
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
                value = self.value(tirx.const(True, "bool"), at.image, row, column, first + k)
                tap = (i * w.kernel[1] + j) * inputs + k
                weight = self.weight[tap * w.y.channels + at.channel]
                T.buffer_store(total, total[0] + value * weight, [0])
        self.store(total[0], at.pixel, at.channel)


class _Block(_Layer):
    def __init__(self, workload: Conv2d, flats: list[Buffer], depth: int, columns: int) -> None:
        super().__init__(workload, flats)
        self.depth, self.columns = depth, columns
        self.steps = -(-depth // STEP)

    def emit(self, batch: Expr) -> None:
        w = self.workload
        self.pixels = batch * (w.y.height * w.y.width)
        across = self.columns // TILE
        with (
            T.launch_thread("blockIdx.x", ceil_div(self.pixels, TILE) * across) as block,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            self.thread = thread
            self.first_column = bind(tirx.floormod(block, across) * TILE)
            self.first_pixel = bind(tirx.floordiv(block, across) * TILE)
            self.left = T.alloc_buffer((STEP * _PITCH,), "float32", scope="shared")
            self.right = T.alloc_buffer((STEP * _PITCH,), "float32", scope="shared")
            self.sums = accumulators(PART * PART, "float32", 0.0)
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
        """Which of x this thread brings: one element of k for PART pixels; and of the weight, PART neighbours."""
        w = self.workload
        self.k = bind(tirx.floormod(self.thread, STEP))
        self.row = bind(tirx.floordiv(self.thread, STEP))
        self.windows = []
        for i in range(PART):
            pixel = bind(self.first_pixel + self.row + i * (TILE // PART))
            image, row, column = split(pixel, w.y.height, w.y.width)
            top, left = row * w.stride[0] - w.padding[0], column * w.stride[1] - w.padding[1]
            self.windows.append((bind(pixel < self.pixels), image, bind(top), bind(left)))
        self.next_left = T.alloc_buffer((PART,), "float32", scope="local")
        self.next_right = T.alloc_buffer((PART,), "float32", scope="local")

    def _load(self, step: Expr) -> None:
        w = self.workload
        k = bind(step * STEP + self.k)
        tap_row, tap_column, channel = split(k, w.kernel[1], w.x.channels)
        for i, (exists, image, top, left) in enumerate(self.windows):
            row = bind(top + tap_row * w.dilation[0])
            column = bind(left + tap_column * w.dilation[1])
            there = tirx.all(exists, k < self.depth)
            T.buffer_store(self.next_left, self.value(there, image, row, column, channel), [i])
        place = (step * STEP + self.row) * self.columns + self.first_column + self.k * PART
        T.add_to_parent(self.next_right.vstore(0, self.weight.vload(place, f"float32x{PART}")))

    def _put(self) -> None:
        for i in range(PART):
            place = self.k * _PITCH + self.row + i * (TILE // PART)
            T.buffer_store(self.left, self.next_left[i], [place])
        place = self.row * _PITCH + self.k * PART
        T.add_to_parent(self.right.vstore(place, self.next_right.vload(0, f"float32x{PART}")))

    def _multiply(self) -> None:
        a = T.alloc_buffer((PART,), "float32", scope="local")
        b = T.alloc_buffer((PART,), "float32", scope="local")
        for k in range(STEP):
            for registers, tile, part in ((a, self.left, self.row), (b, self.right, self.k)):
                value = tile.vload(k * _PITCH + part * PART, f"float32x{PART}")
                T.add_to_parent(registers.vstore(0, value))
            for i in range(PART):
                for j in range(PART):
                    place = i * PART + j
                    T.buffer_store(self.sums, self.sums[place] + a[i] * b[j], [place])

    def _store(self) -> None:
        for i in range(PART):
            pixel = bind(self.first_pixel + self.row * PART + i)
            for j in range(PART):
                channel = bind(self.first_column + self.k * PART + j)
                inside = tirx.all(pixel < self.pixels, channel < self.workload.y.channels)
                with T.If(inside), T.Then():
                    self.store(self.sums[i * PART + j], pixel, channel)
