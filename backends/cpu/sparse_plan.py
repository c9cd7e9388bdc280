"""How a sparse convolution is cut: the map its taps read, register tiles of pixels, chunks of lines.

A kernel multiplies vectors of neighbouring pixels by one broadcast weight, so that a tap is an offset. Where output pixel i
reads input pixel i alone (``flat``) it reads the input where it is, all pixels in one line. Elsewhere each chunk of lines is
first gathered: one map a tap column, with strides and padding undone and every line beginning at a whole vector (or, of
short lines, several of them filling one), so that all taps load aligned vectors. The gathered input is read
``density * output channels`` times.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import PLANE_PIXELS, Conv2d, Layout

_LEAST_LANES = 8  # SSE4's dot products gain nothing
_BESIDE_ACCUMULATORS = {32: 14, 16: 7}  # registers of half-packed vectors, a weight, the epilogue


@dataclass(frozen=True)
class SparseChoice:
    """What is free in the cut: the register tile in vectors, down and across, and the tiles down a gathered chunk."""

    high: int
    wide: int
    chunk: int = 1


@dataclass(frozen=True)
class SparsePlan:
    """The cut of one sparse convolution; offsets and sizes in pixels of 32 bits.

    A vector holds ``lines`` output lines of ``pitch`` pixels each, or a part of one (``lines`` 1). ``phases`` are the input
    rows modulo the stride that some tap reads.
    """

    workload: Conv2d
    lanes: int
    flat: bool
    high: int
    wide: int
    chunk: int

    @property
    def width(self) -> int:
        """Pixels of an output line."""
        y = self.workload.y
        return y.height * y.width if self.flat else y.width

    @property
    def height(self) -> int:
        """Output lines."""
        return 1 if self.flat else self.workload.y.height

    @cached_property
    def pitch(self) -> int:
        """Pixels from a gathered line to the next."""
        return _pitch(self.width, self.lanes)

    @property
    def lines(self) -> int:
        """Output lines of a vector."""
        return max(1, self.lanes // self.pitch)

    @property
    def vectors_wide(self) -> int:
        """Vectors of a line."""
        return -(-self.width // self.lanes)

    @property
    def tile_lines(self) -> int:
        """Output lines of a tile."""
        return self.high * self.lines

    @property
    def chunk_lines(self) -> int:
        """Output lines whose input is gathered together."""
        return self.chunk * self.tile_lines

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
    def gathered_lines(self) -> int:
        """Lines of a gathered map."""
        stride, dilation = self.workload.stride[0], self.workload.dilation[0]
        return self.chunk_lines + (self.workload.kernel[0] - 1) * dilation // stride

    @cached_property
    def map_pixels(self) -> int:
        """Pixels from one plane's map to the next: an odd number of cache lines, for the sake of L1's sets."""
        if self.flat:
            return self.workload.x.plane_pixels
        return PLANE_PIXELS * (-(-self.gathered_lines * self.pitch // PLANE_PIXELS) | 1)

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

    def offsets(self) -> list[int]:
        """Where tap ``(plane, r, s)``, in that order, reads the tile's first pixel."""
        (kh, kw), (dh, _) = self.workload.kernel, self.workload.dilation
        stride = self.workload.stride[0]
        return [
            (self.map_of(s, r * dh % stride) + plane) * self.map_pixels
            + (0 if self.flat else r * dh // stride * self.pitch)
            for plane, r, s in itertools.product(
                range(self.workload.x.planes), range(kh), range(kw)
            )
        ]


def _pitch(width: int, lanes: int) -> int:
    if width > lanes // 2:
        return -(-width // lanes) * lanes
    return 1 << (width - 1).bit_length()


def _is_flat(workload: Conv2d) -> bool:
    return (workload.kernel, workload.stride, workload.padding) == ((1, 1), (1, 1), (0, 0))


def is_planar(layout: Layout) -> bool:
    return layout.order == "planar"


def plan_sparse(workload: Conv2d, isa: Isa, choice: SparseChoice | None = None) -> SparsePlan:
    """Cut a convolution, by ``choice`` or else by the cost model."""
    flat = _is_flat(workload)
    if choice is None:
        choice = SparseChoice(1, min(7, -(-workload.y.height * workload.y.width // isa.lanes)))
        if not flat:
            w = -(-workload.y.width // isa.lanes)
            wide = min(w, 8)
            lines = max(1, isa.lanes // _pitch(workload.y.width, isa.lanes))
            high = max(1, min(8 // wide, -(-workload.y.height // lines)))
            choice = SparseChoice(high, wide, 1)
    return SparsePlan(workload, isa.lanes, flat, choice.high, choice.wide, choice.chunk)
