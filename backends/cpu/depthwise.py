"""Depthwise convolution in NHWC, one filter a channel: a vector of channels times a few neighbouring pixels.

Integer: ``dot_group`` rows of one input column are interleaved into the operand of a dot product whose sums run over taps
instead of channels, ``acc[c] += sum_j x[r + j, s, c] * w[r + j, s, c]``. An interleaved column serves every pixel whose
window covers it. Channels fewer than a vector, and floats, take one multiply-add a tap. The zero point of the input
goes into the bias: ``sum((x - z) * w) + b = sum(x * w) + (b - z * sum(w))``, the margins hold z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    MAX_ALLOCA_BYTES,
    Buffer,
    Expr,
    bind,
    dot,
    load,
    minimum,
    multiply_add,
    store,
    vector,
)
from graphopt.backends.cpu.epilogue import apply_epilogue
from graphopt.backends.cpu.isa import INT8_STEP, Isa
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
UNROLLED_STEPS = 32  # tap steps a pixel; beyond it the rows of taps become a loop


@dataclass(frozen=True)
class _Plan:
    """How the channels and taps are cut: the same for the packed weights and for the code.

    A tile is ``rows`` x ``pixels`` outputs. ``group`` rows of one input column make a step, ``steps`` of them cover all that
    the tile reads; a group of 1 means one multiply-add a tap.
    """

    channels: int
    lanes: int
    group: int
    steps: int
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
    def step_size(self) -> int:
        """Weights that one step multiplies."""
        return self.lanes * self.group

    @property
    def copies(self) -> int:
        """Copies of the weights: one an output row, shifted by that row, where a group mixes rows."""
        return self.rows if self.group > 1 else 1

    @property
    def copy_size(self) -> int:
        """Weights of one copy."""
        steps = self.steps if self.group > 1 else self.kernel_height
        return steps * self.kernel_width * self.step_size

    @property
    def block_size(self) -> int:
        """Weights of one vector of channels."""
        return self.copies * self.copy_size

    def touches(self, step: int, row: int) -> bool:
        """True where any of the step's input rows meets a tap of output ``row``."""
        return step * self.group < row + self.kernel_height and (step + 1) * self.group > row


def _plan(workload: Conv2d, isa: Isa) -> _Plan:
    channels, (height, width) = workload.x.channels, workload.kernel
    if workload.groups != channels or workload.y.channels != channels:
        raise CompileError(
            f"depthwise takes one filter a channel, not {workload.groups} groups of {channels} "
            f"channels to {workload.y.channels}; use the grouped kernel."
        )
    integer = workload.x.dtype != "float32"
    lanes = min(isa.lanes, 1 << (channels.bit_length() - 1))
    group = isa.dot_group if integer and lanes == isa.lanes else 1
    steps, rows = -(-height // group), 1
    adjacent = workload.stride[0] == workload.dilation[0] == 1 and workload.y.height > 1
    # A second row of outputs reads what the first one interleaved, as long as that costs no further group.
    if adjacent and (group == 1 or height % group) and steps * width <= UNROLLED_STEPS:
        rows, steps = 2, -(-(height + 1) // group)
    limit = min(MAX_PIXELS, MAX_ALLOCA_BYTES // (4 * lanes * rows), workload.y.width)
    if isa.registers < 32:
        limit = min(limit, 4)
    # The fewest columns read, counting a whole tile for the last one; among equals the widest tile.
    pixels = min(
        range(1, limit + 1), key=lambda p: (-(-workload.y.width // p) * (p + width - 1), -p)
    )
    return _Plan(channels, lanes, group, steps, height, width, rows, pixels)


def pack_depthwise(
    workload: Conv2d,
    isa: Isa,
    weight: npt.NDArray[np.generic],
    bias: npt.NDArray[np.generic] | None,
    multiplier: npt.NDArray[np.float32] | None = None,
) -> list[npt.NDArray[np.generic]]:
    """Weights ``[block][copy][step][column][lane][group]``, bias and multipliers in the order of the kernel's arguments.

    ``weight`` is ``[C, 1, height, width]``; taps that fill up a group are zero. An integer bias takes the zero point of x.
    """
    plan = _plan(workload, isa)
    height, width = workload.kernel
    steps = plan.copy_size // (plan.step_size * width)
    taps = np.zeros((plan.channels, plan.copies, steps * plan.group, width), weight.dtype)
    for copy in range(plan.copies):
        taps[:, copy, copy : copy + height] = weight[:, 0]
    split = taps.reshape(plan.channels, plan.copies, steps, plan.group, width)
    packed = np.stack([split[first : first + plan.lanes] for first in plan.blocks])
    packed = np.ascontiguousarray(packed.transpose(0, 2, 3, 5, 1, 4)).reshape(-1)
    if weight.dtype == np.float32:
        zeros = np.zeros(plan.channels, np.float32)
        return [packed, zeros if bias is None else bias.astype(np.float32)]
    total = np.zeros(plan.channels, np.int64) if bias is None else bias.astype(np.int64)
    total = total - workload.x_zero_point * weight.astype(np.int64).sum(axis=(1, 2, 3))
    arrays: list[npt.NDArray[np.generic]] = [packed, total.astype(np.int32)]
    return arrays if multiplier is None else [*arrays, multiplier.astype(np.float32)]


def _interleave(isa: Isa, rows: Sequence[Expr]) -> Expr:
    """``[lane][group]``: the taps of a channel side by side, as the left operand of the row's dot product.

    For four bytes a lane: collect by 32-bit words, then transpose 4 x 4 bytes inside each 128-bit part; two shuffles.
    """
    lanes, group = isa.lanes, isa.dot_group
    if group == INT8_STEP:
        words, parts = lanes // group, range(lanes // group)
        joined = tirx.Shuffle(list(rows), list(range(group * lanes)))
        by_word = [row * words + part for part in parts for row in range(group)]
        moved = tirx.Shuffle([T.reinterpret(f"int32x{lanes}", joined)], by_word)
        by_byte = [
            part * 16 + row * group + byte
            for part in parts
            for byte in range(group)
            for row in range(group)
        ]
        transposed = tirx.Shuffle([T.reinterpret(f"uint8x{group * lanes}", moved)], by_byte)
        return bind(T.reinterpret(f"int8x{group * lanes}", transposed))
    order = [row * lanes + lane for lane in range(lanes) for row in range(group)]
    return bind(T.cast(tirx.Shuffle(list(rows), order), f"int16x{group * lanes}"))


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

    def column(self, origin: Expr, offset: int, step: Expr) -> Expr:
        """The operand of one step: ``group`` rows of the input column ``offset``, interleaved."""
        plan, layout = self.plan, self.x.layout
        line = layout.columns * layout.channel_stride
        down, last = self.workload.dilation[0], plan.rows + plan.kernel_height - 2
        rows = []
        for tap in range(plan.group):
            # A row past the last repeats it: inside the tensor, and its weight is zero.
            row = minimum(step * plan.group + tap, last)
            index = origin + row * (down * line) + offset * layout.channel_stride
            rows.append(bind(self.x.load(index, plan.lanes)))
        if plan.group > 1:
            return _interleave(self.isa, rows)
        return rows[0] if self.accumulator == "float32" else bind(self.widen(rows[0]))

    def widen(self, value: Expr) -> Expr:
        return T.cast(value, vector("int32", self.plan.lanes))

    def taps(self, index: Expr) -> Expr:
        """The right operand of one step."""
        plan = self.plan
        value = load(self.weight, index, plan.step_size)
        if plan.group == 1 and self.accumulator == "int32":
            return bind(self.widen(value))
        wide = plan.group > 1 and plan.group < INT8_STEP
        return bind(T.cast(value, vector("int16", plan.step_size)) if wide else value)

    def accumulate(self, accumulator: Expr, x: Expr, weight: Expr) -> Expr:
        if self.plan.group > 1:
            return dot(self.isa, accumulator, [x], [weight])
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
                first_tap = (index if plan.group > 1 else index - r) * plan.kernel_width
                base = weights + (r * plan.copy_size if plan.group > 1 else 0)
                weight = self.taps(base + (first_tap + tap) * plan.step_size)
                for pixel in range(plan.pixels):
                    offset = pixel * stride + tap * right
                    if offset not in columns:
                        columns[offset] = self.column(origin, offset, index)
                    place = places.index((r, pixel)) * lanes
                    held = load(sums, place, lanes)
                    store(sums, place, self.accumulate(held, columns[offset], weight))

        if plan.steps * plan.kernel_width <= 2 * UNROLLED_STEPS:
            for index in range(plan.steps):
                step(index, [r for r in range(plan.rows) if plan.touches(index, r)])
        else:
            with T.serial(0, plan.steps) as index:
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
        if self.y.layout.channel_stride > plan.channels:
            with T.serial(0, plan.rows) as r, T.serial(0, width) as column:
                pixel = bind(self.y.at(image, row + r, column))
                fill_pad_channels(self.y, pixel, self.isa.vector_bytes)


def depthwise(workload: Conv2d, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, weight, bias, [multiplier], [residual], y)``; declines a channel multiplier (``CompileError``)."""
    plan = _plan(workload, isa)
    x, y, residual = workload.x, workload.y, workload.residual
    integer = x.dtype != "float32"
    arguments = [
        activation_argument("x", x),
        Argument("weight", (len(plan.blocks) * plan.block_size,), "int8" if integer else "float32"),
        Argument("bias", (plan.channels,), "int32" if integer else "float32"),
    ]
    if integer:
        arguments.append(Argument("multiplier", (plan.channels,), "float32"))
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
        code = _Kernel(
            workload,
            isa,
            plan,
            View(x, flats[0], batch),
            View(y, flats[-1], batch),
            None if residual is None else View(residual, flats[-2], batch),
            flats[1],
            flats[2],
            flats[3] if integer else None,
        )
        for_rows(code.y, isa.vector_bytes, threads, code.row, plan.rows)

    return build(name, arguments, body)
