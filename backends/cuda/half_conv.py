"""Convolutions on float16 that no tensor core is filled by: depthwise, grouped, batch norms; sums in float32.

Depthwise, a thread makes ``COLUMNS`` neighbouring pixels of a group of channels, which share the columns that their windows have in
common, and every weight. Grouped, it makes one pixel of up to four output channels of one group, which share their inputs.
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
from graphopt.backends.cuda.depthwise import is_depthwise
from graphopt.backends.cuda.epilogue import apply_activation, to_float
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.stream import (
    Place,
    accumulators,
    each_group,
    group_of,
    load_group,
    store_group,
    vector,
)

Array = np.ndarray[Any, Any]

COLUMNS = 4
THREADS = 128
_MOST = 4  # channels of a thread


def pack_half(workload: Conv2d, weight: Array, bias: Array | None, dtype: str) -> list[Array]:
    """Weight OIHW as ``[tap][input channel of a group][output]`` of ``dtype``, outputs as x's channels lie, and the bias."""
    out, channels, height, width = weight.shape
    size = _outputs(workload)
    rows = np.zeros((height * width * channels, size), dtype)
    rows[:, :out] = weight.transpose(2, 3, 1, 0).reshape(-1, out)
    shift = np.zeros(size, np.float32)
    if bias is not None:
        shift[:out] = bias
    return [rows.reshape(-1), shift]


def half_conv(workload: Conv2d, weight_dtype: str = "float16") -> PrimFunc:
    """The kernel ``(x, weight, bias, [residual], y)`` of packed constants, floats of either type; see ``pack_half``."""
    x, y = workload.x, workload.y
    taps = math.prod(workload.kernel) * (x.channels // workload.groups)
    size = _outputs(workload)
    arguments = [
        activation("x", x),
        Argument("weight", (taps * size,), weight_dtype),
        Argument("bias", (size,), "float32"),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    form = _Strip if is_depthwise(workload) else _Grouped
    kernel = f"{workload.kernel[0]}x{workload.kernel[1]}"
    shape = f"{y.height}x{y.width}x{x.channels}x{y.channels}_{kernel}"
    plain = replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))
    name = kernel_name("cuda_half", shape, plain, weight_dtype)
    return build(name, arguments, lambda batch, flats: form(workload, flats).emit(batch))


def _outputs(workload: Conv2d) -> int:
    """Output channels of the packed weight: as many as a kernel makes, those without a meaning too."""
    return max(workload.y.channels, 0 if workload.y.shared else workload.y.channel_stride)


class _Layer:
    def __init__(self, workload: Conv2d, flats: list[Buffer]) -> None:
        self.workload = workload
        self.x, self.y = View(workload.x, flats[0]), View(workload.y, flats[-1])
        self.weight, self.bias = flats[1:3]
        self.residual = None if workload.residual is None else View(workload.residual, flats[3])
        self.size = _outputs(workload)
        self.group = 1

    def load_weights(self, row: Expr, channel: Expr) -> list[Expr]:
        """The weights of the thread's channels in a row of the packed weight."""
        dtype = str(self.weight.dtype)
        values = T.alloc_buffer((self.group,), dtype, scope="local")
        place = row * self.size + channel
        T.add_to_parent(values.vstore(0, self.weight.vload(place, vector(dtype, self.group))))
        return [bind(to_float(values[i])) for i in range(self.group)]

    def add_product(self, sums: Buffer, place: int, value: Expr, weight: Expr) -> None:
        T.buffer_store(sums, sums[place] + value * weight, [place])

    def store(self, sums: Buffer, first: int, pixel: Expr, channel: Expr) -> None:
        """``activation(sum + bias + residual)`` of the thread's channels, rounded once."""
        values = [bind(sums[first + i] + self.bias[channel + i]) for i in range(self.group)]
        if self.residual is not None:
            others = load_group(self.residual, pixel, channel, self.group)
            values = [bind(v + to_float(o)) for v, o in zip(values, others, strict=True)]
        kind = self.workload.epilogue.activation
        store_group(self.y, pixel, channel, [apply_activation(kind, value) for value in values])


class _Strip(_Layer):
    """Depthwise: pixels side by side."""

    def emit(self, batch: Expr) -> None:
        w = self.workload
        others = () if w.residual is None else (w.residual,)
        self.group = group_of(w.x, w.y, *others)
        strips = -(-w.y.width // COLUMNS)
        parts = self.y.stored_channels // self.group
        total = batch * (w.y.height * strips * parts)
        with (
            T.launch_thread("blockIdx.x", ceil_div(total, THREADS)) as block,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            index = bind(block * THREADS + thread)
            with T.If(index < total), T.Then():
                image, row, strip, part = split(index, w.y.height, strips, parts)
                self.channel = bind(part * self.group)
                self.first = bind(strip * COLUMNS)
                sums = accumulators(COLUMNS * self.group, "float32", 0.0)
                with T.serial(0, w.kernel[0]) as tap_row:
                    self._row_of_taps(sums, image, row, tap_row)
                pixel = bind((image * w.y.height + row) * w.y.width + self.first)
                for column in range(COLUMNS):
                    with T.If(self.first + column < w.y.width), T.Then():
                        self.store(sums, column * self.group, pixel + column, self.channel)

    def _row_of_taps(self, sums: Buffer, image: Expr, row: Expr, tap_row: Expr) -> None:
        w, width = self.workload, self.workload.kernel[1]
        line = bind(row * w.stride[0] - w.padding[0] + tap_row * w.dilation[0])
        left = bind(self.first * w.stride[1] - w.padding[1])
        inside = bind(tirx.all(line >= 0, line < w.x.height))
        weights = [
            self.load_weights(bind(tap_row * width + tap), self.channel) for tap in range(width)
        ]
        uses: dict[int, list[tuple[int, int]]] = {}  # column of x -> (pixel of the strip, tap)
        for pixel in range(COLUMNS):
            for tap in range(width):
                uses.setdefault(pixel * w.stride[1] + tap * w.dilation[1], []).append((pixel, tap))
        for column, products in sorted(uses.items()):
            place = bind(left + column)
            there = tirx.all(inside, place >= 0, place < w.x.width)
            with T.If(there), T.Then():
                pixel = bind((image * w.x.height + line) * w.x.width + place)
                loaded = load_group(self.x, pixel, self.channel, self.group)
                values = [bind(to_float(value)) for value in loaded]
                for output, tap in products:
                    for i, value in enumerate(values):
                        self.add_product(sums, output * self.group + i, value, weights[tap][i])


class _Grouped(_Layer):
    """One pixel of output channels that read the same inputs."""

    def emit(self, batch: Expr) -> None:
        w = self.workload
        self.inputs, outputs = w.x.channels // w.groups, w.y.channels // w.groups
        others = () if w.residual is None else (w.residual,)
        # within a group of channels, and whole: those that a pixel lacks would be in none
        self.group = math.gcd(group_of(w.y, *others), outputs, self.y.stored_channels)
        self.vector = math.gcd(group_of(w.x), self.inputs)
        self.per_group = outputs
        each_group(batch, self.y, self.group, self._output)

    def _output(self, at: Place) -> None:
        w = self.workload
        sums = accumulators(self.group, "float32", 0.0)
        with T.If(at.channel < w.y.channels), T.Then():
            first = bind(tirx.floordiv(at.channel, self.per_group) * self.inputs)
            with T.serial(0, w.kernel[0]) as i, T.serial(0, w.kernel[1]) as j:
                row = bind(at.row * w.stride[0] - w.padding[0] + i * w.dilation[0])
                column = bind(at.column * w.stride[1] - w.padding[1] + j * w.dilation[1])
                inside = tirx.all(row >= 0, row < w.x.height, column >= 0, column < w.x.width)
                with T.If(inside), T.Then():
                    pixel = bind((at.image * w.x.height + row) * w.x.width + column)
                    tap = bind((i * w.kernel[1] + j) * self.inputs)
                    with T.serial(0, self.inputs // self.vector) as part:
                        k = bind(part * self.vector)
                        self._products(sums, at.channel, pixel, bind(first + k), bind(tap + k))
        self.store(sums, 0, at.pixel, at.channel)

    def _products(self, sums: Buffer, channel: Expr, pixel: Expr, source: Expr, row: Expr) -> None:
        values = [bind(to_float(v)) for v in load_group(self.x, pixel, source, self.vector)]
        for n, value in enumerate(values):
            for i, weight in enumerate(self.load_weights(bind(row + n), channel)):
                self.add_product(sums, i, value, weight)
