"""How a 3 x 3 convolution is cut for Winograd's F(4, 3), and when that is the faster way.

Tiles of 4 x 4 outputs, of all images in one line, are worked on in chunks. For each chunk: the input's transforms for all
channels, then for each block of output channels 36 matrix products ``[tiles, in] x [in, out]`` and the transforms back.
The last tile of a row or column, and the last chunk, overlap their neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.isa import INT8_STEP, Isa
from graphopt.backends.cpu.winograd_transform import LARGEST_SUM, POINTS, TILE
from graphopt.backends.cpu.workload import Conv2d

_MOST_VECTORS = 3  # wider blocks make the buffer of products outgrow L1 for nothing
_LINE = 16  # words of a cache line
_CHUNK_SHARE = 0.7  # of L2, for a chunk's transformed inputs and products, and for weights that fit
# A tile and vector of channels: 36 loads, 12 transforms, 36 stores; and 36 loads, 10 transforms, 16 epilogues.
_INPUT_CYCLES = {"uint8": 120.0, "float32": 300.0}
_OUTPUT_CYCLES = {"uint8": 120.0, "float32": 200.0}
_PRODUCT_CYCLES = 0.7  # a vector of products stored beside the next tile's sums
_CALL_CYCLES = 20.0  # a register tile: its addresses, its loop
_L2_BYTES_A_CYCLE = 32.0
_L3_BYTES_A_CYCLE = 10.0
_LOOP_CYCLES = 0.5
_LOAD_CYCLES = 0.6  # two a cycle at best
_LATENCY = 5.0  # of a sum to itself
_DIRECT_CYCLES = 2.0  # a vector of the direct form, beside its products
_DIRECT_PIXELS = (7, 8)  # of its register tiles, the last of which overlaps its neighbour
_DIRECT_OVERHEAD = 1.03
_GAIN = 0.95  # of the direct form's time, above which the direct form stays


@dataclass(frozen=True)
class WinogradPlan:
    """The cut of one convolution: ``steps`` products deep, ``tiles x vectors`` registers of sums.

    ``streams``: the weights come from beyond L2. ``in_channels`` counts pad channels up to a whole step. ``chunk`` tiles share a buffer; ``splits`` is how many tasks share
    a chunk's output channels, each of which transforms the input for itself.
    """

    in_channels: int
    out_channels: int
    steps: int
    streams: bool
    lanes: int
    tiles_high: int
    tiles_wide: int
    tiles: int
    vectors: int
    chunk: int
    splits: int

    @property
    def image(self) -> int:
        """Tiles of one image."""
        return self.tiles_high * self.tiles_wide

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels, the last one perhaps partial."""
        return -(-self.out_channels // self.lanes)

    @property
    def block_channels(self) -> int:
        """Output channels of a full block."""
        return self.vectors * self.lanes

    @property
    def full_blocks(self) -> int:
        """Blocks of ``vectors`` whole vectors."""
        return self.out_channels // self.block_channels

    @property
    def tail_channels(self) -> int:
        """Output channels of the last, narrower block; 0 where there is none."""
        return self.out_channels % self.block_channels

    @property
    def calls(self) -> int:
        """Register tiles that cover a chunk."""
        return -(-self.chunk // self.tiles)

    @property
    def point_inputs(self) -> int:
        """32-bit words from one point's inputs to the next one's: never whole pages, which share one set of the L1 cache."""
        return -(-self.chunk * self.steps // _LINE) * _LINE + _LINE

    @property
    def packed_weights(self) -> int:
        """Elements (32 bits) of the transformed weights."""
        return self.group_vectors * POINTS * self.steps * self.lanes

    @property
    def packed_channels(self) -> int:
        """Elements of the packed bias and multiplier."""
        return self.group_vectors * self.lanes


def _pairs_up(workload: Conv2d) -> bool:
    """True where the input's channels, pad included, are whole steps."""
    x = workload.x
    return x.dtype == "float32" or x.first_channel + x.channels + x.channels % 2 <= x.channel_stride


def fits(workload: Conv2d) -> bool:
    """True for the convolutions that F(4, 3) computes: 3 x 3, dense, stride and dilation 1, maps of at least 4 x 4."""
    y = workload.y
    return (
        workload.kernel == (3, 3)
        and workload.stride == workload.dilation == (1, 1)
        and workload.groups == 1
        and min(y.height, y.width) >= TILE
        and _pairs_up(workload)
    )


def sums_fit(weight: npt.NDArray[np.int8], bias: npt.NDArray[np.int32] | None = None) -> bool:
    """True where no sum of bytes times these int8 weights (OIHW), and bias, leaves the range in which it can be recovered.

    The zero point of the bytes only moves the sum: a difference of two bytes is at most 255.
    """
    rows = weight.astype(np.int64).reshape(weight.shape[0], -1)
    positive, negative = rows.clip(min=0).sum(axis=1), -rows.clip(max=0).sum(axis=1)
    largest = 255 * np.maximum(positive, negative)
    if bias is not None:
        largest = largest + np.abs(bias.astype(np.int64))
    return bool(largest.max(initial=0) <= LARGEST_SUM)


def _product_cycles(isa: Isa, integer: bool, tiles: int, vectors: int, steps: int) -> float:
    """Estimated cycles of one register tile of one of the 36 matrix products."""
    products = isa.pair_instructions if integer else 1
    step = max(tiles * vectors * products / 2, (tiles + vectors) * _LOAD_CYCLES, _LATENCY)
    step += _LOOP_CYCLES
    return steps * step + tiles * vectors * _PRODUCT_CYCLES + _CALL_CYCLES


def _register_tile(isa: Isa, integer: bool, line: int, vectors: int, steps: int) -> tuple[int, int]:
    """The ``tiles x vectors`` of least estimated time that leave registers for a step's weights and a product."""
    free = isa.registers - 1 - (integer and not isa.dot_accumulates)
    weights = isa.pair_registers if integer else 1
    fitting = [
        (t, v)
        for v in range(1, min(_MOST_VECTORS, vectors) + 1)
        for t in range(1, line + 1)
        if t * v + weights * v <= free
    ]

    def cycles(tile: tuple[int, int]) -> float:
        calls = -(-line // tile[0]) * (vectors / tile[1])
        return calls * _product_cycles(isa, integer, *tile, steps)

    return min(fitting, key=cycles)


def _chunk(
    tiles: int, image: int, bytes_a_tile: int, weight_bytes: int, isa: Isa, threads: int
) -> tuple[int, int]:
    """Tiles of a chunk, and tasks a chunk, of ``tiles`` tiles in all; never more than an image, for any batch.

    Inputs and products of a chunk share L2 with the weights, where those fit at all.
    """
    left = _CHUNK_SHARE * isa.l2_bytes
    if weight_bytes < left:
        left = max(left - weight_bytes, left / 3)
    largest = max(1, int(left) // bytes_a_tile)
    count = -(-tiles // min(largest, image))
    if threads > 1 and count % threads and count < 4 * threads:
        shared = -(-count // threads) * threads
        if tiles // shared >= 8:
            count = shared
        else:
            return -(-tiles // count), threads
    return -(-tiles // count), 1


def plan_winograd(workload: Conv2d, isa: Isa, threads: int) -> WinogradPlan:
    """Cut a convolution that ``fits``."""
    x, y = workload.x, workload.y
    integer = x.dtype == "uint8"
    in_channels = x.channels + (x.channels % 2 if integer else 0)
    steps = in_channels // 2 if integer else in_channels
    high, wide = -(-y.height // TILE), -(-y.width // TILE)
    image = high * wide
    every = image * (x.batch or 1)
    group_vectors = -(-y.channels // isa.lanes)
    _, vectors = _register_tile(isa, integer, image, group_vectors, steps)
    bytes_a_tile = 4 * POINTS * (steps + vectors * isa.lanes)
    weight_bytes = 4 * POINTS * steps * group_vectors * isa.lanes
    chunk, splits = _chunk(every, image, bytes_a_tile, weight_bytes, isa, threads)
    tiles, vectors = _register_tile(isa, integer, chunk, group_vectors, steps)
    return WinogradPlan(
        in_channels=in_channels,
        out_channels=y.channels,
        steps=steps,
        streams=weight_bytes > isa.l2_bytes // 2,
        lanes=isa.lanes,
        tiles_high=high,
        tiles_wide=wide,
        tiles=tiles,
        vectors=vectors,
        chunk=chunk,
        splits=splits,
    )


def _cycles(plan: WinogradPlan, isa: Isa, integer: bool, every: int) -> float:
    """Estimated cycles on one thread."""
    dtype = "uint8" if integer else "float32"
    chunks = -(-every // plan.chunk)
    one = _product_cycles(isa, integer, plan.tiles, plan.vectors, plan.steps)
    calls = -(-plan.chunk // plan.tiles) * (plan.group_vectors / plan.vectors)
    weight_bytes = 4 * plan.packed_weights
    rate = _L2_BYTES_A_CYCLE if weight_bytes < isa.l2_bytes // 2 else _L3_BYTES_A_CYCLE
    arithmetic = chunks * max(POINTS * calls * one, weight_bytes / rate)
    wide = 2 * plan.lanes if integer else plan.lanes
    inputs = every * math.ceil(plan.in_channels / wide) * _INPUT_CYCLES[dtype] * plan.splits
    return arithmetic + inputs + every * plan.group_vectors * _OUTPUT_CYCLES[dtype]


def _direct_cycles(workload: Conv2d, isa: Isa) -> float:
    """Estimated cycles of the direct form, which a 3 x 3 window keeps busy with products."""
    x, y = workload.x, workload.y
    steps, products = x.channels, 1
    if x.dtype == "uint8":
        steps = -(-x.channels // INT8_STEP)
        products = isa.products
    width = min(-(-y.width // pixels) * pixels for pixels in _DIRECT_PIXELS)
    pixels = (x.batch or 1) * y.height * width
    one = 9 * steps * products / 2 + _DIRECT_CYCLES
    return pixels * -(-y.channels // isa.lanes) * one * _DIRECT_OVERHEAD


def estimate(workload: Conv2d, isa: Isa, threads: int) -> float:
    """Estimated cycles on one thread of a convolution that ``fits``."""
    plan = plan_winograd(workload, isa, threads)
    every = plan.image * (workload.x.batch or 1)
    return _cycles(plan, isa, workload.x.dtype == "uint8", every)


def is_faster(workload: Conv2d, isa: Isa, threads: int) -> bool:
    """True where F(4, 3) is estimated to beat the direct form by a margin."""
    return estimate(workload, isa, threads) < _GAIN * _direct_cycles(workload, isa)
