"""Depthwise convolution in NHWC, one filter a channel: a vector of channels times a few neighbouring pixels.

One multiply-add a tap, in float32 or, for bytes that ``depthwise_bytes`` has no form for, in int32. The zero point of the
input goes into the bias: ``sum((x - z) * w) + b = sum(x * w) + (b - z * sum(w))``, the margins hold z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.depthwise_bytes import ByteKernel
from graphopt.backends.cpu.depthwise_plan import pack_bytes, plan_bytes
from graphopt.backends.cpu.emit import (
    MAX_ALLOCA_BYTES,
    Buffer,
    Expr,
    bind,
    load,
    multiply_add,
    store,
    vector,
)
from graphopt.backends.cpu.epilogue import apply_epilogue
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import (
    Argument,
    View,
    activation_argument,
    build,
    fill_pad_channels,
    for_rows,
    kernel_name,
)
from graphopt.backends.cpu.workload import Conv2d
from graphopt.errors import CompileError

MAX_PIXELS = 8
UNROLLED_TAPS = 32  # a pixel; beyond them the rows of taps become a loop


@dataclass(frozen=True)
class _Plan:
    """How channels and rows are cut; the same for the packed weights and for the code.

    A tile is ``rows`` x ``pixels`` outputs of ``lanes`` channels.
    """

    channels: int
    lanes: int
    kernel_height: int
    kernel_width: int
    rows: int
    pixels: int

    @property
    def blocks(self) -> list[int]:
        """The first channel of each vector; the last one overlaps its neighbour."""
        whole = list(range(0, self.channels - self.lanes + 1, self.lanes))
        return [*whole, self.channels - self.lanes] if self.channels % self.lanes else whole

    @property
    def block_size(self) -> int:
        """Weights of one vector of channels."""
        return self.kernel_height * self.kernel_width * self.lanes


def _check(workload: Conv2d) -> None:
    channels = workload.x.channels
    if workload.groups != channels or workload.y.channels != channels:
        raise CompileError(
            f"depthwise takes one filter a channel, not {workload.groups} groups of {channels} "
            f"channels to {workload.y.channels}; use the grouped kernel."
        )


def _plan(workload: Conv2d, isa: Isa) -> _Plan:
    channels, (height, width) = workload.x.channels, workload.kernel
    lanes = min(isa.lanes, 1 << (channels.bit_length() - 1))
    adjacent = workload.stride[0] == workload.dilation[0] == 1 and workload.y.height > 1
    # A second row of outputs reads what the first one loaded.
    rows = 2 if adjacent and height * width <= UNROLLED_TAPS else 1
    limit = min(MAX_PIXELS, MAX_ALLOCA_BYTES // (4 * lanes * rows), workload.y.width)
    if isa.registers < 32:
        limit = min(limit, 4)
    # The fewest columns read, counting a whole tile for the last one; among equals the widest tile.
    pixels = min(
        range(1, limit + 1), key=lambda p: (-(-workload.y.width // p) * (p + width - 1), -p)
    )
    return _Plan(channels, lanes, height, width, rows, pixels)


def pack_depthwise(
    workload: Conv2d,
    isa: Isa,
    weight: npt.NDArray[np.generic],
    bias: npt.NDArray[np.generic] | None,
    multiplier: npt.NDArray[np.float32] | None = None,
) -> list[npt.NDArray[np.generic]]:
    """Weights ``[block][row][column][lane]``, bias and multipliers in the order of the kernel's arguments.

    ``weight`` is ``[C, 1, height, width]``. An integer bias takes the zero point of x.
    """
    bytes_plan = plan_bytes(workload, isa)
    if bytes_plan is not None and multiplier is not None:
        return pack_bytes(bytes_plan, workload, isa, weight, bias, multiplier)
    plan = _plan(workload, isa)
    packed = np.stack([weight[first : first + plan.lanes, 0] for first in plan.blocks])
    packed = np.ascontiguousarray(packed.transpose(0, 2, 3, 1)).reshape(-1)
    sums = folded_bias(workload, weight, bias)
    return [packed, sums] if multiplier is None else [packed, sums, multiplier.astype(np.float32)]


@dataclass(frozen=True)
class _Kernel:
    """The code of one depthwise kernel over flat buffers."""

    workload: Conv2d
    isa: Isa
    plan: _Plan
    x: View
    y: View
    residual: View | None
    weight: Buffer
    bias: Buffer
    multiplier: Buffer | None

    @property
    def accumulator(self) -> str:
        return "float32" if self.workload.x.dtype == "float32" else "int32"

    def operand(self, value: Expr) -> Expr:
        """Elements as the accumulator's type."""
        if self.accumulator == "float32":
            return bind(value)
        return bind(T.cast(value, vector("int32", self.plan.lanes)))

    def column(self, origin: Expr, row: Expr, offset: int) -> Expr:
        """The input row ``row`` of the column ``offset``."""
        layout = self.x.layout
        line = layout.columns * layout.channel_stride * self.workload.dilation[0]
        index = origin + row * line + offset * layout.channel_stride
        return self.operand(self.x.load(index, self.plan.lanes))

    def accumulate(self, accumulator: Expr, x: Expr, weight: Expr) -> Expr:
        if self.accumulator == "float32":
            return multiply_add(self.isa, x, weight, accumulator)
        return accumulator + x * weight

    def tile(self, image: Expr, row: Expr, first: Expr, block: Expr, channel: Expr) -> None:
        """``rows`` x ``pixels`` outputs from ``row`` and column ``first`` on, for the channels from ``channel`` on."""
        plan, workload = self.plan, self.workload
        lanes, stride, right = plan.lanes, workload.stride[1], workload.dilation[1]
        top, left = workload.padding
        corner = self.x.at(image, row * workload.stride[0] - top, first * stride - left, channel)
        origin, weights = bind(corner), bind(block * plan.block_size)
        places = [(r, p) for r in range(plan.rows) for p in range(plan.pixels)]
        sums = T.alloc_buffer((len(places) * lanes,), self.accumulator)
        start = bind(load(self.bias, channel, lanes))
        for place in range(len(places)):
            store(sums, place * lanes, start)

        def step(index: Expr, rows: Sequence[int]) -> None:
            columns: dict[int, Expr] = {}
            for tap, r in product(range(plan.kernel_width), rows):
                place = ((index - r) * plan.kernel_width + tap) * lanes
                weight = self.operand(load(self.weight, weights + place, lanes))
                for pixel in range(plan.pixels):
                    offset = pixel * stride + tap * right
                    if offset not in columns:
                        columns[offset] = self.column(origin, index, offset)
                    slot = places.index((r, pixel)) * lanes
                    held = load(sums, slot, lanes)
                    store(sums, slot, self.accumulate(held, columns[offset], weight))

        if plan.kernel_height * plan.kernel_width <= UNROLLED_TAPS:
            for index in range(plan.rows + plan.kernel_height - 1):
                step(index, [r for r in range(plan.rows) if 0 <= index - r < plan.kernel_height])
        else:
            with T.serial(0, plan.kernel_height) as index:
                step(index, [0])
        for place, (r, pixel) in enumerate(places):
            value = bind(load(sums, place * lanes, lanes))
            self.finish(value, image, row + r, first + pixel, channel)

    def finish(self, value: Expr, image: Expr, row: Expr, column: Expr, channel: Expr) -> None:
        """Epilogue and store of one vector."""
        lanes = self.plan.lanes
        residual = multiplier = None
        if self.residual is not None:
            where = self.residual.at(image, row, column, channel)
            residual = bind(self.residual.load(where, lanes))
        if self.multiplier is not None:
            multiplier = bind(load(self.multiplier, channel, lanes))
        out = apply_epilogue(
            self.workload.epilogue, value, lanes, multiplier, residual, self.y.layout.dtype
        )
        self.y.store(bind(self.y.at(image, row, column, channel)), out)

    def row(self, image: Expr, row: Expr) -> None:
        """``rows`` rows of outputs: vectors of channels outside, so that their weights stay in registers, then pixels."""
        plan, width = self.plan, self.y.layout.width

        def columns(block: Expr, channel: Expr) -> None:
            with T.serial(0, width // plan.pixels) as index:
                self.tile(image, row, index * plan.pixels, block, channel)
            if width % plan.pixels:
                self.tile(image, row, width - plan.pixels, block, channel)

        whole = plan.channels // plan.lanes
        with T.serial(0, whole) as block:
            columns(block, block * plan.lanes)
        if plan.channels % plan.lanes:
            columns(whole, plan.channels - plan.lanes)
        if self.y.layout.pad_channels:
            with T.serial(0, plan.rows) as r, T.serial(0, width) as column:
                pixel = bind(self.y.at(image, row + r, column))
                fill_pad_channels(self.y, pixel, self.isa.vector_bytes)


def depthwise(workload: Conv2d, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, weight, bias, [multiplier], [residual], y)``; declines a channel multiplier (``CompileError``)."""
    _check(workload)
    bytes_plan = plan_bytes(workload, isa)
    plan = _plan(workload, isa)
    weights, constants = len(plan.blocks) * plan.block_size, plan.channels
    if bytes_plan is not None:
        weights, constants = bytes_plan.weight_bytes(workload), bytes_plan.constants
    x, y, residual = workload.x, workload.y, workload.residual
    integer = x.dtype != "float32"
    arguments = [
        activation_argument("x", x),
        Argument("weight", (weights,), "int8" if integer else "float32"),
        Argument("bias", (constants,), "int32" if integer else "float32"),
    ]
    if integer:
        arguments.append(Argument("multiplier", (constants,), "float32"))
    if residual is not None:
        arguments.append(activation_argument("residual", residual))
    arguments.append(activation_argument("y", y))
    key = replace(
        workload,
        x=replace(x, fill=0),
        x_zero_point=0,
        residual=None if residual is None else replace(residual, fill=0),
    )
    size = "x".join(map(str, workload.kernel))
    legible = f"{size}_s{workload.stride[0]}_{x.height}x{x.width}x{x.channels}"
    name = kernel_name("depthwise", legible, key, isa.name, threads)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        views = (
            View(x, flats[0], batch),
            View(y, flats[-1], batch),
            None if residual is None else View(residual, flats[-2], batch),
        )
        code: ByteKernel | _Kernel
        if bytes_plan is not None:
            code = ByteKernel(workload, isa, bytes_plan, *views, *flats[1:4])
        else:
            multiplier = flats[3] if integer else None
            code = _Kernel(workload, isa, plan, *views, flats[1], flats[2], multiplier)
        for_rows(code.y, isa.vector_bytes, threads, code.row, code.plan.rows)

    function = build(name, arguments, body)
    # Weights that may alias y are loaded where they are used; else LLVM moves them all to the stack first.
    return function if bytes_plan is None else function.with_attr("tirx.noalias", False)
