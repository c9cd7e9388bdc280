"""How a depthwise convolution of bytes is cut and how its weights lie; the kernel is in ``depthwise_bytes``.

The unpack instructions that interleave the rows of a column leave the channels of a vector in the order of its 128-bit
parts; weights, bias and multipliers are packed in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.workload import Conv2d

PART_BYTES = 16  # unpacks and packs work within 128 bits
MAX_STEPS = 36  # tap steps a pixel, all unrolled: 11 x 11
MAX_ROWS = 4
_EPILOGUE_COST = (
    5.5  # instructions a vector: convert, scale, clamp, round, a share of the packs and the store
)
_WEIGHT_BYTE_COST = 0.15  # instructions in the time that a byte of weights comes from L3


@dataclass(frozen=True)
class Block:
    """``channels`` of the map from ``start`` on; a vector holds those of the pixels ``v + stretch`` of a row."""

    start: int
    channels: int
    stretches: tuple[int, ...]
    length: int  # of a stretch

    @property
    def parts(self) -> int:
        return len(self.stretches)


@dataclass(frozen=True)
class BytePlan:
    """How channels, rows and taps are cut; the same for the packed weights and for the code.

    ``group`` rows of an input column make a step, ``steps`` of them cover what ``rows`` rows of outputs read.
    ``operands`` is the number of int32 vectors that a vector of channels becomes: 4, or 2 of half as many channels where
    the columns of the former would not stay in registers.
    """

    vector_bytes: int
    group: int
    steps: int
    rows: int
    operands: int
    blocks: tuple[Block, ...]

    @property
    def lanes(self) -> int:
        """int32 lanes of a vector."""
        return self.vector_bytes // 4

    @property
    def channels(self) -> int:
        """Channels of a block, those of all its parts."""
        return self.operands * self.lanes

    @property
    def constants(self) -> int:
        """Elements of the packed bias, and of the packed multipliers."""
        return len(self.blocks) * self.channels

    def weight_bytes(self, workload: Conv2d) -> int:
        """Elements of the packed weight."""
        return self.constants * self.rows * self.steps * workload.kernel[1] * self.group


def _blocks(channels: int, capacity: int, least: int, width: int) -> tuple[Block, ...] | None:
    """Blocks of at most ``capacity`` channels, the last of which may overlap; None where pixels are too few."""
    size = min(capacity, 1 << (channels.bit_length() - 1))
    starts = [(first, size) for first in range(0, channels - size + 1, size)]
    rest = channels % size
    if rest:
        tail = max(least, 1 << (rest - 1).bit_length())
        tail = tail if capacity // tail <= width else size
        starts.append((channels - tail, tail))
    if capacity // size > width:
        return None
    return tuple(
        Block(first, count, *_stretches(capacity // count, width)) for first, count in starts
    )


def _stretches(parts: int, width: int) -> tuple[tuple[int, ...], int]:
    """The first pixel of each of ``parts`` stretches that cover a row, and their length."""
    length = -(-width // parts)
    return tuple(min(part * length, width - length) for part in range(parts)), length


def plan_bytes(workload: Conv2d, isa: Isa) -> BytePlan | None:
    """The cut of least estimated time; None where bytes have no form here (few channels, a large window)."""
    x, y, (height, width), group = workload.x, workload.y, workload.kernel, isa.dot_group
    steps = -(-height // group)
    if x.dtype != "uint8" or x.channels < PART_BYTES or steps * width > MAX_STEPS:
        return None
    dots = steps * width * isa.dot_instructions
    carried = carried_columns(workload)

    def cost(plan: BytePlan) -> float:
        """Instructions for the map, and the wait for the weights."""
        output = plan.rows * plan.operands * (dots + _EPILOGUE_COST)
        column = plan.steps * (8 if group == INT8_STEP else plan.operands + 2)
        total = plan.weight_bytes(workload) * _WEIGHT_BYTE_COST
        for block in plan.blocks:
            pixels = block.length * (output + (width - carried) * column) + carried * column
            total += -(-y.height // plan.rows) * pixels
        live = plan.operands * (steps * width + plan.rows) + 2
        return total * (1 if live <= isa.registers else live / isa.registers)

    plans = []
    for operands, rows in product((4, 2), range(1, min(MAX_ROWS, y.height) + 1)):
        least = PART_BYTES * operands // 4
        blocks = _blocks(x.channels, isa.vector_bytes * operands // 4, least, y.width)
        # More rows of outputs read what the first one interleaved, as long as that costs no further step.
        shares = rows == 1 or (
            workload.stride[0] == workload.dilation[0] == 1
            and -(-(height + rows - 1) // group) == steps
            and len(set(isa.flips)) == 1  # a tap's place in its step is another one in each row
        )
        if blocks is not None and shares:
            plans.append(BytePlan(isa.vector_bytes, group, steps, rows, operands, blocks))
    return min(plans, key=cost, default=None)


def carried_columns(workload: Conv2d) -> int:
    """Columns of a window that the next one along the row reads too."""
    if workload.dilation[1] != 1:
        return 0
    return max(0, workload.kernel[1] - workload.stride[1])


def _channel_order(plan: BytePlan, block: Block) -> npt.NDArray[np.intp]:
    """``[operand][lane]``: the channel of each lane of a block's int32 vectors."""
    lane = np.arange(plan.lanes)
    within = 4 * plan.operands * (lane // 4) % block.channels + lane % 4
    return block.start + within + 4 * np.arange(plan.operands)[:, None]


def pack_bytes(
    plan: BytePlan,
    workload: Conv2d,
    isa: Isa,
    weight: npt.NDArray[np.generic],
    bias: npt.NDArray[np.generic] | None,
    multiplier: npt.NDArray[np.float32],
) -> list[npt.NDArray[np.generic]]:
    """Weights ``[block][row][step][column][operand][half][lane][group]``, bias and multipliers ``[block][operand][lane]``.

    Taps that fill up a group are zero. The zero point of the input goes into the bias, and what the row's flips leave out.
    """
    channels, _, height, width = weight.shape
    taps = np.zeros((channels, plan.rows, plan.steps * plan.group, width), np.int8)
    for row in range(plan.rows):
        taps[:, row, row : row + height] = weight[:, 0]
    split = taps.reshape(channels, plan.rows, plan.steps, plan.group, width)
    split = split.transpose(1, 2, 4, 0, 3)  # row, step, column, channel, group
    order = np.stack([_channel_order(plan, block) for block in plan.blocks])
    packed = np.stack([split[:, :, :, channel] for channel in order])
    if isa.form == "long":
        packed = np.stack([packed[..., half] for half in isa.half_channels], axis=-3)
    start = folded_bias(workload, weight, bias)
    if any(isa.flips):
        flips = np.array(isa.flips, np.int32)
        start = start + np.einsum("swcg,g->c", split[0].astype(np.int32), flips)
    sums, scales = start[order], multiplier.astype(np.float32)[order]
    return [np.ascontiguousarray(array).reshape(-1) for array in (packed, sums, scales)]
