"""Depthwise convolution of bytes in NHWC: whole vectors of channels, sums over the taps of a column by dot products.

``dot_group`` rows of one input column are interleaved by the unpack instructions, which leave the channels of a vector
in the order of its 128-bit parts. Weights, bias and multipliers are packed in that order, and the saturating packs of the
store undo it: nothing is permuted. Along a row of outputs the interleaved columns stay in registers: one output takes
``stride`` new ones. Fewer channels than a vector holds are those of ``parts`` pixels, each in a stretch of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.depthwise_plan import PART_BYTES, Block, BytePlan, carried_columns
from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    constant,
    dot,
    flipped,
    load,
    pack,
    round_to_int,
    slice_lanes,
    store,
    to_float,
)
from graphopt.backends.cpu.epilogue import apply_epilogue, quantized_add, requantize
from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.stream import View, fill_pad_channels
from graphopt.backends.cpu.workload import Conv2d

Position = tuple[Expr, Expr, Expr, Expr]  # image, row, column, channel


def _unpack(a: Expr, b: Expr, unit: int, high: bool, size: int) -> Expr:
    """Alternate units of ``unit`` bytes from the low or high halves of the 128-bit parts of two byte vectors."""
    units = PART_BYTES // 2 // unit
    order = [
        source * size + part + (high * units + index) * unit + byte
        for part in range(0, size, PART_BYTES)
        for index in range(units)
        for source in (0, 1)
        for byte in range(unit)
    ]
    return bind(tirx.Shuffle([a, b], order))


@dataclass(frozen=True)
class _Tile:
    """A row of outputs of one block, the block called ``number`` in the packed arrays."""

    block: Block
    number: Expr
    channel: Expr


@dataclass(frozen=True)
class ByteKernel:
    """The code of one kernel over flat buffers."""

    workload: Conv2d
    isa: Isa
    plan: BytePlan
    x: View
    y: View
    residual: View | None
    weight: Buffer
    bias: Buffer
    multiplier: Buffer

    def row(self, image: Expr, row: Expr) -> None:
        """``rows`` rows of outputs, block after block."""
        blocks, width = self.plan.blocks, self.y.layout.width
        size = blocks[0].channels
        alike = [b for i, b in enumerate(blocks) if (b.channels, b.start) == (size, i * size)]
        with T.serial(0, len(alike)) as number:
            self.stretch(image, row, _Tile(blocks[0], number, number * size))
        for index in range(len(alike), len(blocks)):
            self.stretch(image, row, _Tile(blocks[index], index, blocks[index].start))
        if self.y.layout.pad_channels:
            with T.serial(0, self.plan.rows) as r, T.serial(0, width) as column:
                pixel = bind(self.y.at(image, row + r, column))
                fill_pad_channels(self.y, pixel, self.isa.vector_bytes)

    def stretch(self, image: Expr, row: Expr, tile: _Tile) -> None:
        """All pixels of a stretch; the columns that a pixel shares with the next one are carried along."""
        plan, workload = self.plan, self.workload
        (down, right), (top, left), (_, width) = workload.stride, workload.padding, workload.kernel
        origin = bind(self.x.at(image, row * down - top, -left, tile.channel))
        carried = carried_columns(workload)
        # Kept in registers along the row; the weights are not, which would only move them to the stack.
        biases, scales = self.constants(self.bias, tile), self.constants(self.multiplier, tile)
        held = [
            [
                T.alloc_buffer((plan.operands * plan.vector_bytes,), "int8")
                for _ in range(plan.steps)
            ]
            for _ in range(carried)
        ]
        for index, step in product(range(carried), range(plan.steps)):
            self.keep(held[index][step], self.column(origin, 0, index, step, tile.block))
        with T.serial(0, tile.block.length) as pixel:
            columns = [
                [self.kept(held[tap][step]) for step in range(plan.steps)]
                if tap < carried
                else [
                    self.column(origin, pixel * right, tap * workload.dilation[1], step, tile.block)
                    for step in range(plan.steps)
                ]
                for tap in range(width)
            ]
            for r, sums in enumerate(self.accumulate(columns, biases, tile)):
                self.finish(sums, scales, (image, row + r, pixel, tile.channel), tile.block)
            for index, step in product(range(carried), range(plan.steps)):
                self.keep(held[index][step], columns[index + right][step])

    def keep(self, buffer: Buffer, operands: Sequence[Expr]) -> None:
        for index, operand in enumerate(operands):
            size = self.plan.vector_bytes
            store(buffer, index * size, T.reinterpret(f"int8x{size}", operand))

    def kept(self, buffer: Buffer) -> list[Expr]:
        size = self.plan.vector_bytes
        return [
            self.as_operand(load(buffer, index * size, size)) for index in range(self.plan.operands)
        ]

    def as_operand(self, value: Expr) -> Expr:
        """A vector of bytes as the left operand of the row's dot product."""
        size = self.plan.vector_bytes
        kind = f"int8x{size}" if self.plan.group == INT8_STEP else f"int16x{size // 2}"
        return bind(T.reinterpret(kind, value))

    def gather(self, view: View, offset: Expr, block: Block, stride: int) -> Expr:
        """The block's channels of its pixels, one for each stretch, as a vector of bytes."""
        pitch, size = stride * view.layout.channel_stride, block.channels
        pieces = [bind(view.load(offset + first * pitch, size)) for first in block.stretches]
        order = list(range(size * block.parts))
        if self.plan.operands == 2:  # eight channels into the low half of each 128-bit part
            order = [part + index % 8 for part in order[::8] for index in range(PART_BYTES)]
        if len(pieces) == 1 and len(order) == size:
            return pieces[0]
        twice = len(order) // (size * block.parts)  # a shuffle has no more lanes than it reads
        return bind(tirx.Shuffle(pieces * twice, order))

    def column(self, origin: Expr, pixel: Expr, offset: int, step: int, block: Block) -> list[Expr]:
        """The operands of one step: ``group`` rows of the input column ``pixel + offset``, interleaved."""
        plan, layout = self.plan, self.x.layout
        line = layout.columns * layout.channel_stride * self.workload.dilation[0]
        last = plan.rows + self.workload.kernel[0] - 2
        rows = []
        for tap in range(plan.group):
            # A row past the last repeats it: inside the tensor, and its weight is zero.
            row = min(step * plan.group + tap, last)
            index = origin + pixel * layout.channel_stride
            index = index + (row * line + offset * layout.channel_stride)
            value = self.gather(self.x, index, block, self.workload.stride[1])
            rows.append(flipped(self.isa, value, [tap] * INT8_STEP))
        return self.interleave(rows)

    def interleave(self, rows: Sequence[Expr]) -> list[Expr]:
        size, operands = self.plan.vector_bytes, []
        for high in range(self.plan.operands // 2):
            first = _unpack(rows[0], rows[1], 1, bool(high), size)
            second, unit = constant("uint8", 0, size), 1
            if self.plan.group == INT8_STEP:
                second = _unpack(rows[2], rows[3], 1, bool(high), size)
                unit = PART_BYTES // 2 if self.isa.form == "long" else 2
            operands += [_unpack(first, second, unit, bool(half), size) for half in (0, 1)]
        return [self.as_operand(operand) for operand in operands]

    def accumulate(
        self, columns: Sequence[Sequence[Sequence[Expr]]], biases: Sequence[Expr], tile: _Tile
    ) -> list[list[Expr]]:
        """The sums of one vector of outputs in every row; their chains of dot products are emitted side by side."""
        plan, (_, width) = self.plan, self.workload.kernel
        size = plan.lanes * plan.group
        row_size = plan.steps * width * plan.operands * size
        first = bind(tile.number * (plan.rows * row_size))
        sums = [list(biases) for _ in range(plan.rows)]
        for step, tap, row in product(range(plan.steps), range(width), range(plan.rows)):
            for index in range(plan.operands):
                place = ((step * width + tap) * plan.operands + index) * size + row * row_size
                weight = load(self.weight, first + place, size)
                if plan.group < INT8_STEP:
                    weight = T.cast(weight, f"int16x{size}")
                operand = columns[tap][step][index]
                sums[row][index] = bind(dot(self.isa, sums[row][index], [operand], [weight]))
        return sums

    def constants(self, buffer: Buffer, tile: _Tile) -> list[Expr]:
        """A block's biases or multipliers."""
        plan = self.plan
        first = tile.number * plan.channels
        return [
            bind(load(buffer, first + index * plan.lanes, plan.lanes))
            for index in range(plan.operands)
        ]

    def finish(
        self, sums: Sequence[Expr], scales: Sequence[Expr], position: Position, block: Block
    ) -> None:
        """Epilogue and store of one vector of outputs."""
        if self.y.layout.dtype == "float32":
            self.store_floats(sums, scales, position, block)
            return
        epilogue, lanes = self.workload.epilogue, self.plan.lanes
        rounding, add = epilogue.requantize, epilogue.residual_add
        assert rounding is not None
        zero_point, values = rounding.zero_point, []
        if self.residual is not None and add is not None:
            others = self.widened_residual(self.residual, position, block)
            for v, scale, other in zip(sums, scales, others, strict=True):
                q = bind(requantize(rounding, v, scale, lanes))
                values.append(bind(quantized_add(add, q, other, lanes)))
            zero_point = 0
        else:
            # Of the clamp, the packs' saturation does a lower bound of 0. An upper one stays: a float beyond int32 would
            # become the least integer.
            for v, scale in zip(sums, scales, strict=True):
                scaled = to_float(v, lanes) * scale
                if rounding.qmin > 0:
                    scaled = T.max(scaled, constant("float32", rounding.qmin - zero_point, lanes))
                scaled = T.min(scaled, constant("float32", rounding.qmax - zero_point, lanes))
                values.append(bind(round_to_int(scaled, lanes, self.isa.round_intrinsic)))
        self.store_bytes(values, zero_point, position, block)

    def widened_residual(self, view: View, position: Position, block: Block) -> list[Expr]:
        """The residual tensor's elements as int32, in the order of the sums."""
        size, widened = self.plan.vector_bytes, []
        zero, value = constant("uint8", 0, size), self.gather(view, view.at(*position), block, 1)
        for high in range(self.plan.operands // 2):
            word = _unpack(value, zero, 1, bool(high), size)
            widened += [_unpack(word, zero, 2, bool(half), size) for half in (0, 1)]
        return [bind(T.reinterpret(f"int32x{self.plan.lanes}", vector)) for vector in widened]

    def store_bytes(
        self, values: Sequence[Expr], zero_point: int, position: Position, block: Block
    ) -> None:
        """``values + zero_point`` as bytes in the order of the channels, a piece a pixel."""
        plan, size = self.plan, self.plan.vector_bytes
        offset = constant("int16", zero_point, 2 * plan.lanes)
        words = [
            bind(pack(self.isa, "int16", self.isa.pack_words, *pair) + offset)
            for pair in zip(values[::2], values[1::2], strict=True)
        ]
        packed = bind(pack(self.isa, "uint8", self.isa.pack_bytes, words[0], words[-1]))
        if plan.operands == 2:  # both halves of each part are the same eight channels
            order = [part + byte for part in range(0, size, PART_BYTES) for byte in range(8)]
            packed = bind(tirx.Shuffle([packed], order))
        target, pitch = bind(self.y.at(*position)), self.y.layout.channel_stride
        for part, first in enumerate(block.stretches):
            piece = slice_lanes(packed, part * block.channels, block.channels, plan.channels)
            self.y.store(target + first * pitch, piece)

    def store_floats(
        self, sums: Sequence[Expr], scales: Sequence[Expr], position: Position, block: Block
    ) -> None:
        """``activation(float32(sum) * multiplier)``, stored by the four channels that lie together."""
        lanes, unit = self.plan.lanes, 4 * self.plan.operands
        target, pitch = bind(self.y.at(*position)), self.y.layout.channel_stride
        for index, (value, scale) in enumerate(zip(sums, scales, strict=True)):
            out = bind(apply_epilogue(self.workload.epilogue, value, lanes, scale))
            for first in range(0, lanes, 4):
                part, channel = divmod(first // 4 * unit, block.channels)
                offset = block.stretches[part] * pitch + channel + 4 * index
                self.y.store(target + offset, slice_lanes(out, first, 4, lanes))
