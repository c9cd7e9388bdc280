"""How a 3 x 3 convolution is cut for Winograd's algorithm, and when that is the faster way.

Tiles of 4 x 4 outputs, in the last rows and columns of a map what is left of them, are worked on in chunks of an image.
For each chunk: the input's transforms for all channels, then for each block of output channels 36 matrix products
``[tiles, in] x [in, out]`` and the transforms back. A smaller tile lacks some of the 36 points. The last chunk overlaps
its neighbour.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.isa import PAIRED, Isa
from graphopt.backends.cpu.winograd_transform import LARGEST_SUM, POINTS, TILE, WINDOW
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
class Tiles:
    """``high x wide`` tiles of ``rows x columns`` outputs from ``(top, left)`` on, the ``first`` in an image's line."""

    first: int
    high: int
    wide: int
    rows: int
    columns: int
    top: int
    left: int

    @property
    def end(self) -> int:
        """Behind the last one."""
        return self.first + self.high * self.wide

    @property
    def points(self) -> int:
        """Products a tile."""
        return (self.rows + WINDOW - TILE) * (self.columns + WINDOW - TILE)


@dataclass(frozen=True)
class Points:
    """Points of rows ``row_start .. row_stop`` and columns likewise, the tiles of an image that have them, and how many
    of those share a register tile."""

    row_start: int
    row_stop: int
    column_start: int
    column_stop: int
    first: int
    end: int
    tiles: int

    @property
    def count(self) -> int:
        """Points."""
        return (self.row_stop - self.row_start) * (self.column_stop - self.column_start)


def cut_map(height: int, width: int) -> tuple[Tiles, ...]:
    """The tiles of an image in their line: the right end, whole tiles, the lower end, the corner.

    In this order the tiles that have a point lie side by side, for every point.
    """
    high, wide = height // TILE, width // TILE
    lower, right = height % TILE, width % TILE
    pieces = [
        (high, 1, TILE, right, 0, wide * TILE),
        (high, wide, TILE, TILE, 0, 0),
        (1, wide, lower, TILE, high * TILE, 0),
        (1, 1, lower, right, high * TILE, wide * TILE),
    ]
    cut, first = [], 0
    for piece in pieces:
        tiles = Tiles(first, *piece)
        if tiles.rows and tiles.columns:
            cut.append(tiles)
            first = tiles.end
    return tuple(cut)


def _points(cut: tuple[Tiles, ...]) -> list[tuple[int, int, int, int, int, int]]:
    """The fields of ``Points`` but for ``tiles``: the 36 points by the tiles that have them."""
    edge = WINDOW - TILE
    parts = []
    for sides in ({t.rows for t in cut}, {t.columns for t in cut}):
        least = min(sides) + edge
        parts.append([(0, least), (least, WINDOW)] if least < WINDOW else [(0, WINDOW)])
    found = []
    for row_start, row_stop in parts[0]:
        for column_start, column_stop in parts[1]:
            having = [
                t for t in cut if t.rows + edge > row_start and t.columns + edge > column_start
            ]
            found.append(
                (row_start, row_stop, column_start, column_stop, having[0].first, having[-1].end)
            )
    return found


@dataclass(frozen=True)
class WinogradPlan:
    """The cut of one convolution: ``steps`` products deep, ``vectors`` registers of sums a tile.

    ``streams``: the weights come from beyond L2. ``in_channels`` counts pad channels up to a whole step. ``chunk`` tiles
    share a buffer, and ``chunks`` are an image; ``splits`` is how many tasks share a chunk's output channels, each of
    which transforms the input for itself.
    """

    in_channels: int
    out_channels: int
    steps: int
    streams: bool
    lanes: int
    cut: tuple[Tiles, ...]
    points: tuple[Points, ...]
    vectors: int
    chunk: int
    chunks: int
    splits: int

    @property
    def image(self) -> int:
        """Tiles of one image."""
        return self.cut[-1].end

    @property
    def point_rows(self) -> list[tuple[tuple[int, int], list[Points]]]:
        """The points by their rows, so that each comes in the order of the weights, which stream."""
        rows = dict.fromkeys((points.row_start, points.row_stop) for points in self.points)
        return [(row, [p for p in self.points if p.row_start == row[0]]) for row in rows]

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


def function_name(workload: Conv2d, isa: Isa, threads: int) -> str:
    """``winograd_u8s8_56x56x64_64_<hash>``: legible, unique, blind to what does not shape the code."""
    x = workload.x
    kinds = "u8s8" if x.dtype == "uint8" else "f32"
    shaping = replace(workload, x_zero_point=0, x=replace(x, fill=0))
    digest = hashlib.sha256(f"{shaping!r} {isa.name} {threads}".encode()).hexdigest()[:8]
    return f"winograd_{kinds}_{x.height}x{x.width}x{x.channels}_{workload.y.channels}_{digest}"


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
    loads = tiles / isa.steps_a_load + vectors
    step = max(tiles * vectors * products / isa.pipes, loads * _LOAD_CYCLES, _LATENCY)
    step += _LOOP_CYCLES
    return steps * step + tiles * vectors * _PRODUCT_CYCLES + _CALL_CYCLES


def _most_tiles(isa: Isa, integer: bool, vectors: int) -> int:
    """Tiles of a register tile, which leaves registers for a step's weights and a product."""
    free = isa.registers - 1 - (integer and not isa.dot_accumulates) - isa.by_element
    weights = isa.pair_registers if integer else 1
    most = (free - weights * vectors) // (vectors + isa.by_element)
    # multiplies of int16 read lanes of the first 16 registers: more than half of them, and pixels move to and fro
    return min(most, isa.registers // 4) if integer and isa.by_element else most


def _register_tile(
    isa: Isa, integer: bool, line: int, vectors: int, steps: int
) -> tuple[float, int]:
    """Estimated cycles of the matrix product of one point, ``line`` tiles long, and the tiles that share registers."""
    return min(
        (-(-line // tiles) * _product_cycles(isa, integer, tiles, vectors, steps), tiles)
        for tiles in range(1, min(line, _most_tiles(isa, integer, vectors)) + 1)
    )


def _cut_points(
    cut: tuple[Tiles, ...], chunk: int, isa: Isa, integer: bool, group_vectors: int, steps: int
) -> tuple[float, int, tuple[Points, ...]]:
    """Estimated cycles of a chunk's products, the vectors of a block, and the points: the cut of least time."""
    options = []
    for vectors in range(1, min(_MOST_VECTORS, group_vectors) + 1):
        if isa.by_element and vectors not in PAIRED:
            continue
        cycles, points = 0.0, []
        for fields in _points(cut):
            line = min(chunk, fields[-1] - fields[-2])
            one, tiles = _register_tile(isa, integer, line, vectors, steps)
            points.append(Points(*fields, tiles))
            cycles += points[-1].count * one * group_vectors / vectors
        options.append((cycles, vectors, tuple(points)))
    return min(options, key=lambda option: option[0])


def _chunks(
    image: int, batch: int, bytes_a_tile: int, weight_bytes: int, isa: Isa, threads: int
) -> tuple[int, int]:
    """Chunks of an image of ``image`` tiles, and tasks a chunk.

    Inputs and products of a chunk share L2 with the weights, where those fit at all.
    """
    left = _CHUNK_SHARE * isa.l2_bytes
    if weight_bytes < left:
        left = max(left - weight_bytes, left / 3)
    largest = max(1, int(left) // bytes_a_tile)
    count = -(-image // min(largest, image))
    tasks = batch * count
    if threads > 1 and tasks % threads and tasks < 4 * threads:
        shared = -(-count // threads) * threads
        if image // shared < 8:
            return count, threads
        count = shared
    return count, 1


def plan_winograd(workload: Conv2d, isa: Isa, threads: int) -> WinogradPlan:
    """Cut a convolution that ``fits``."""
    x, y = workload.x, workload.y
    integer = x.dtype == "uint8"
    in_channels = x.channels + (x.channels % 2 if integer else 0)
    steps = in_channels // 2 if integer else in_channels
    cut = cut_map(y.height, y.width)
    image = cut[-1].end
    group_vectors = -(-y.channels // isa.lanes)
    _, vectors, _ = _cut_points(cut, image, isa, integer, group_vectors, steps)
    bytes_a_tile = 4 * POINTS * (steps + vectors * isa.lanes)
    weight_bytes = 4 * POINTS * steps * group_vectors * isa.lanes
    chunks, splits = _chunks(image, x.batch or 1, bytes_a_tile, weight_bytes, isa, threads)
    chunk = -(-image // chunks)
    _, vectors, points = _cut_points(cut, chunk, isa, integer, group_vectors, steps)
    return WinogradPlan(
        in_channels=in_channels,
        out_channels=y.channels,
        steps=steps,
        streams=weight_bytes > isa.l2_bytes // 2,
        lanes=isa.lanes,
        cut=cut,
        points=points,
        vectors=vectors,
        chunk=chunk,
        chunks=-(-image // chunk),
        splits=splits,
    )


def _cycles(plan: WinogradPlan, isa: Isa, integer: bool, batch: int) -> float:
    """Estimated cycles on one thread."""
    dtype = "uint8" if integer else "float32"
    products = 0.0
    for points in plan.points:
        # of a map in chunks a point's tiles lie in some of them, the last register tile of each cut short
        calls = -(-(points.end - points.first) // points.tiles)
        one = _product_cycles(isa, integer, points.tiles, plan.vectors, plan.steps)
        products += points.count * calls * one * plan.group_vectors / plan.vectors
    weight_bytes = 4 * plan.packed_weights
    rate = _L2_BYTES_A_CYCLE if weight_bytes < isa.l2_bytes // 2 else _L3_BYTES_A_CYCLE
    arithmetic = max(products, plan.chunks * weight_bytes / rate)
    wide = 2 * plan.lanes if integer else plan.lanes
    whole = sum((t.end - t.first) * t.points for t in plan.cut) / POINTS
    inputs = math.ceil(plan.in_channels / wide) * _INPUT_CYCLES[dtype] * plan.splits
    return batch * (arithmetic + whole * (inputs + plan.group_vectors * _OUTPUT_CYCLES[dtype]))


def _direct_cycles(workload: Conv2d, isa: Isa) -> float:
    """Estimated cycles of the direct form, which a 3 x 3 window keeps busy with products."""
    x, y = workload.x, workload.y
    steps, products = x.channels, 1
    if x.dtype == "uint8":
        row = isa.dense(x.dtype)[-1]
        steps = -(-x.channels // row.step)
        products = row.products
    width = min(-(-y.width // pixels) * pixels for pixels in _DIRECT_PIXELS)
    pixels = (x.batch or 1) * y.height * width
    one = 9 * steps * products / isa.pipes + _DIRECT_CYCLES
    return pixels * -(-y.channels // isa.lanes) * one * _DIRECT_OVERHEAD


def estimate(workload: Conv2d, isa: Isa, threads: int) -> float:
    """Estimated cycles on one thread of a convolution that ``fits``."""
    plan = plan_winograd(workload, isa, threads)
    return _cycles(plan, isa, workload.x.dtype == "uint8", workload.x.batch or 1)


def is_faster(workload: Conv2d, isa: Isa, threads: int) -> bool:
    """True where F(4, 3) is estimated to beat the direct form by a margin."""
    return estimate(workload, isa, threads) < _GAIN * _direct_cycles(workload, isa)
