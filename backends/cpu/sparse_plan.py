"""How a sparse convolution is cut: the map its taps read, register tiles of pixels, chunks of lines.

A kernel multiplies vectors of neighbouring pixels by one broadcast weight, so that a tap is an offset. Where output pixel i
reads input pixel i alone (``flat``) it reads the input where it is, all pixels in one line. Elsewhere each chunk of lines is
first gathered: one map a tap column, with strides and padding undone and every line beginning at a whole vector (or, of
short lines, several of them filling one), so that all taps load aligned vectors. The gathered input is read
``density * output channels`` times. A row that multiplies ``x - flip`` copies the pixels of a flat tile, too: what is copied is flipped
once, and not again with every product.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import PLANE_PIXELS, Conv2d

_LEAST_LANES = 8  # SSE4's dot products gain nothing
_MOST_VECTORS = {
    16: 7,
    32: 8,
}  # by registers: beside a tile stand the half-packed sums of another channel
_WIDEST_OFFSET = 1 << 16
_LOAD_CYCLES = 0.58  # a vector from L1
_L2_LOAD_CYCLES = 1.0
_STREAM_CYCLES = 1.0  # a line of a tile's input, when it is first read
_L1_SHARE = 1.4  # of the row's L1, which is what its smallest processor has: rows go to and fro, so that some is kept
_LATENCY = 2.9  # of a step
_SPREAD_CYCLES = 2.0  # a block's own weights, where they become words or halves
_MOST_PARTS = 12
_LEAST_PLANES = 16  # of a part
_WAIT_CYCLES = 2.3  # a vector of sums stored and loaded again
_ROW_CYCLES = 4.4  # a channel of a tile: its loop, its constants
_EPILOGUE_CYCLES = 0.55  # a vector, mostly beside the products
_RESIDUAL_CYCLES = 4.2
_CROWDED_CYCLES = 11.0  # a row of a tile that spills
_PAGES = 82  # that the first TLB holds beside others
_PAGE_BYTES = 4096
_LINE_BYTES = 64
_PAGE_CYCLES = 0.5  # a vector
_GATHER_CYCLES = 1.9  # a vector copied
_GATHER_LINE_CYCLES = 3.7
_COPY_CYCLES = 1.0  # a vector of a flat tile


@dataclass(frozen=True)
class SparseChoice:
    """What is free in the cut: the register tile in vectors, down and across, the tiles down a gathered chunk, and the
    parts that the input's planes are worked on in."""

    high: int
    wide: int
    chunk: int = 1
    parts: int = 1


@dataclass(frozen=True)
class SparsePlan:
    """The cut of one sparse convolution; offsets and sizes in pixels of 32 bits.

    ``flat``: the input is read where it is, or from a copy of a tile's pixels (``copies``). Where a window is one pixel all
    pixels are one line (``in_line``).

    A vector holds ``lines`` output lines of ``pitch`` pixels each, or a part of one (``lines`` 1). They are ``chunk_rows`` apart,
    so that the vector that a tap reads is a gathered one, too: ``row_pitch`` pixels from a row of vectors to the next. ``phases`` are the input
    rows modulo the stride that some tap reads. ``parts``: a tile's sums over a part of the input planes wait in memory for
    the next part, so that the pixels of a part stay in L1 for all output channels.
    """

    workload: Conv2d
    lanes: int
    flat: bool
    copies: bool
    high: int
    wide: int
    chunk: int
    parts: int = 1

    @property
    def in_line(self) -> bool:
        """True where the whole map is worked on as one line."""
        return _is_in_line(self.workload)

    @property
    def width(self) -> int:
        """Pixels of an output line."""
        y = self.workload.y
        return y.height * y.width if self.in_line else y.width

    @property
    def height(self) -> int:
        """Output lines."""
        return 1 if self.in_line else self.workload.y.height

    @cached_property
    def pitch(self) -> int:
        """Pixels from a gathered line to the next."""
        return _pitch(self.width, self.lanes)

    @property
    def lines(self) -> int:
        """Output lines of a vector."""
        return 1 if self.in_line else max(1, self.lanes // self.pitch)

    @property
    def vectors_wide(self) -> int:
        """Vectors of a line."""
        return -(-self.width // self.lanes)

    @property
    def row_pitch(self) -> int:
        """Pixels from a row of vectors to the next."""
        return max(self.pitch, self.lanes)

    @property
    def chunk_rows(self) -> int:
        """Rows of vectors whose input is gathered together."""
        return self.chunk * self.high

    @property
    def chunk_lines(self) -> int:
        """Their output lines."""
        return self.chunk_rows * self.lines

    @property
    def chunks(self) -> int:
        """Chunks of an image, the last of which overlaps its neighbour."""
        return -(-self.height // self.chunk_lines)

    @property
    def tiles_wide(self) -> int:
        """Tiles across a line, the last of which overlaps its neighbour."""
        return -(-self.vectors_wide // self.wide)

    @property
    def vectors(self) -> int:
        """Accumulators."""
        return self.high * self.wide

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """Input rows modulo the stride that taps read."""
        stride, dilation = self.workload.stride[0], self.workload.dilation[0]
        return tuple(sorted({r * dilation % stride for r in range(self.workload.kernel[0])}))

    @cached_property
    def gathered_rows(self) -> int:
        """Rows of vectors of a gathered map."""
        stride, dilation = self.workload.stride[0], self.workload.dilation[0]
        return self.chunk_rows + (self.workload.kernel[0] - 1) * dilation // stride

    @property
    def gathered_lines(self) -> int:
        """Lines that are copied to a gathered map."""
        return self.workload.y.height if self.in_line else self.gathered_rows * self.lines

    @cached_property
    def map_pixels(self) -> int:
        """Pixels from one plane's map to the next: an odd number of cache lines, for the sake of L1's sets."""
        if self.copies:
            return self.wide * self.lanes
        if self.flat:
            return self.workload.x.plane_pixels
        return PLANE_PIXELS * (-(-self.gathered_rows * self.row_pitch // PLANE_PIXELS) | 1)

    @property
    def maps(self) -> int:
        """Gathered maps of a plane: one a tap column and phase."""
        return self.workload.kernel[1] * len(self.phases)

    @property
    def gathered_pixels(self) -> int:
        """Pixels of all gathered maps of a chunk."""
        return 0 if self.flat else self.maps * self.workload.x.planes * self.map_pixels

    @property
    def rows(self) -> int:
        """Output channels, pad channels of the last plane included."""
        return self.workload.y.planes * self.workload.y.group

    def map_of(self, column: int, phase: int) -> int:
        """The first plane of the map of a tap column and phase."""
        return (column * len(self.phases) + self.phases.index(phase)) * self.workload.x.planes

    @property
    def part_planes(self) -> int:
        """Input planes of a part; the last may have fewer."""
        return -(-self.workload.x.planes // self.parts)

    @property
    def unit(self) -> int:
        """Pixels that every tap's offset is a multiple of."""
        if self.copies:
            return self.map_pixels
        return PLANE_PIXELS if self.flat else math.gcd(PLANE_PIXELS, self.row_pitch)

    def offsets(self) -> list[int]:
        """Where tap ``(plane, r, s)``, in that order, reads the tile's first pixel."""
        (kh, kw), (dh, _) = self.workload.kernel, self.workload.dilation
        stride = self.workload.stride[0]
        return [
            (self.map_of(s, r * dh % stride) + plane) * self.map_pixels
            + (0 if self.flat else r * dh // stride * self.row_pitch)
            for plane, r, s in itertools.product(
                range(self.workload.x.planes), range(kh), range(kw)
            )
        ]


def _pitch(width: int, lanes: int) -> int:
    if width > lanes // 2:
        return -(-width // lanes) * lanes
    return 1 << (width - 1).bit_length()


def _is_in_line(workload: Conv2d) -> bool:
    return (workload.kernel, workload.padding) == ((1, 1), (0, 0))


def _is_flat(workload: Conv2d) -> bool:
    return _is_in_line(workload) and workload.stride == (1, 1)


def fits(workload: Conv2d, isa: Isa) -> str | None:
    """Why the kernel cannot compute a convolution on a row, or None."""
    x, y = workload.x, workload.y
    if isa.lanes < _LEAST_LANES and not isa.by_element:
        return f"{isa.name} has no sparse kernels"
    if workload.groups != 1:
        return "it is grouped"
    if y.height * y.width < isa.lanes // 2:
        return "a vector holds more pixels than the map has"
    if x.batch is None and y.batch is not None:
        return "its batch is made dynamic"
    plan = plan_sparse(workload, isa)
    if max(plan.offsets()) // plan.unit >= _WIDEST_OFFSET:
        return "its input is too large for 16-bit offsets"
    return None


def _candidates(workload: Conv2d, isa: Isa) -> Iterator[SparseChoice]:
    most = _MOST_VECTORS[isa.registers]
    y = workload.y
    if _is_in_line(workload):
        vectors = -(-y.height * y.width // isa.lanes)
        yield from (SparseChoice(1, wide) for wide in range(1, min(most, vectors) + 1))
        return
    lines = max(1, isa.lanes // _pitch(y.width, isa.lanes))
    across, down = -(-y.width // isa.lanes), -(-y.height // lines)
    for wide in range(1, min(most, across) + 1):
        if wide < across <= most and y.width % isa.lanes:
            continue  # the last tile of a line would load across cache lines
        for high in range(1, min(most // wide, down) + 1):
            yield SparseChoice(high, wide)
            chunks = {y.height // (high * lines) // share for share in (1, 2, 4, 8)}
            yield from (SparseChoice(high, wide, chunk) for chunk in sorted(chunks) if chunk > 1)


def _plan(workload: Conv2d, isa: Isa, c: SparseChoice) -> SparsePlan:
    flat = _is_flat(workload)
    copies = flat and workload.x.dtype == "uint8" and any(isa.flips)
    return SparsePlan(workload, isa.lanes, flat, copies, c.high, c.wide, c.chunk, c.parts)


def _fits_map(plan: SparsePlan) -> bool:
    """True where tiles stay in the map; a single one may hold lines more than it has."""
    return plan.chunk_lines <= plan.height or (
        plan.chunk == 1 and plan.high * plan.lines < plan.height + plan.lines
    )


def _instructions(isa: Isa) -> int:
    """That multiply a vector of bytes by a block: two more, where they are spread to words or halves."""
    return isa.products + 2 * (isa.form != "dot")


def _cycles(plan: SparsePlan, isa: Isa, density: float) -> float:
    """Estimated cycles of one image on one thread."""
    workload, vectors = plan.workload, plan.vectors
    x, kh = workload.x, workload.kernel[0]
    maps, rows = 1, plan.high
    if not plan.flat:
        maps, rows = plan.maps, rows + (kh - 1) * workload.dilation[0] // workload.stride[0]
    tile_bytes = 4 * x.planes * maps * rows * plan.wide * plan.lanes
    hit = min(1.0, _L1_SHARE * isa.l1_bytes / (tile_bytes / plan.parts))
    products = 1 if x.dtype == "float32" else _instructions(isa)
    load = hit * _LOAD_CYCLES + (1 - hit) * _L2_LOAD_CYCLES
    pages = x.planes * maps / plan.parts * min(1.0, 4 * plan.map_pixels / _PAGE_BYTES)
    load += _PAGE_CYCLES * (1 - min(1.0, _PAGES / pages))
    spread = 0.0 if isa.form == "dot" or x.dtype == "float32" else _SPREAD_CYCLES
    step = max(_LATENCY, vectors * max(load, products / isa.pipes) + _LOAD_CYCLES + spread)
    blocks = density * x.planes * kh * workload.kernel[1]
    epilogue = _EPILOGUE_CYCLES if workload.residual is None else _RESIDUAL_CYCLES
    row = blocks * step + plan.parts * _ROW_CYCLES + vectors * epilogue
    row += (plan.parts - 1) * vectors * _WAIT_CYCLES
    if vectors == _MOST_VECTORS[isa.registers] and x.dtype == "uint8":
        row += _CROWDED_CYCLES
    tiles = plan.chunks * plan.chunk * plan.tiles_wide
    cycles = tiles * (plan.rows * row + tile_bytes / _LINE_BYTES * _STREAM_CYCLES)
    if plan.copies:
        cycles += tiles * x.planes * plan.wide * _COPY_CYCLES
    if not plan.flat:
        line = -(-workload.y.width // plan.lanes) * _GATHER_CYCLES + _GATHER_LINE_CYCLES
        cycles += plan.chunks * plan.maps * x.planes * plan.gathered_lines * line
    return cycles


def _stays_in_l2(plan: SparsePlan, isa: Isa) -> bool:
    """True where what is gathered does; tiles that share it leave room for weights and waiting sums."""
    return 4 * plan.gathered_pixels <= isa.l2_bytes // (1 if plan.chunk == 1 else 2)


_TYPICAL_DENSITY = (
    0.15  # by which a cut is chosen: one for all layers of a shape, so that they share code
)


def plan_sparse(workload: Conv2d, isa: Isa, choice: SparseChoice | None = None) -> SparsePlan:
    """Cut a convolution, by ``choice`` or else by the cost model."""
    if choice is not None:
        return _plan(workload, isa, choice)
    plans = [_plan(workload, isa, choice) for choice in _candidates(workload, isa)]
    fitting = [plan for plan in plans if _fits_map(plan)]
    small = [plan for plan in fitting if _stays_in_l2(plan, isa)]
    least = min(fitting, key=lambda plan: plan.gathered_pixels)
    most = max(1, min(_MOST_PARTS, workload.x.planes // _LEAST_PLANES))
    parted = [
        dataclasses.replace(plan, parts=parts)
        for plan in small or [least]
        for parts in range(1, most + 1)
    ]
    return min(parted, key=lambda plan: _cycles(plan, isa, _TYPICAL_DENSITY))


def estimate(workload: Conv2d, isa: Isa, density: float) -> float:
    """Estimated cycles of one thread for a share ``density`` of the blocks, cut by the cost model."""
    return (workload.x.batch or 1) * _cycles(plan_sparse(workload, isa), isa, density)
