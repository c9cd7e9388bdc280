"""How an int8 convolution is cut for tensor cores: the block's tile, its warps, what one copy moves, how weights lie.

``y[m, o] = sum_k x[m, k] * w[o, k]`` with ``m = (image, row, column)`` and ``k = (tap row, tap column, channel)``, the
channels of a tap in whole groups of four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.memory import WIDEST

STEP = 64  # bytes of k that a block multiplies between two barriers
STAGES = 3  # tiles in shared memory: one is read, two are on their way
GROUP = 4


@dataclass(frozen=True)
class Tile:
    """``rows x columns`` outputs of a block, by ``warps[0] x warps[1]`` warps."""

    rows: int
    columns: int
    warps: tuple[int, int]

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    @property
    def warp_rows(self) -> int:
        return self.rows // self.warps[0]

    @property
    def warp_columns(self) -> int:
        return self.columns // self.warps[1]

    @property
    def shared_bytes(self) -> int:
        return STAGES * (self.rows + self.columns) * STEP


# Largest first: a product of r x c reads 1/r + 1/c bytes a multiply, so that a larger tile waits less for memory.
TILES = (
    Tile(128, 128, (2, 4)),
    Tile(128, 64, (4, 2)),
    Tile(64, 128, (2, 4)),
    Tile(64, 64, (2, 2)),
    Tile(128, 32, (4, 1)),
    Tile(32, 64, (1, 4)),
    Tile(64, 32, (2, 2)),
    Tile(32, 32, (2, 2)),
)
_ASSUMED_BATCH = 8  # of a dynamic one


@dataclass(frozen=True)
class ConvPlan:
    """A tile and the sizes that follow from it; ``vector`` bytes of x are copied at once."""

    workload: Conv2d
    tile: Tile
    vector: int

    @property
    def tap_channels(self) -> int:
        """Channels of a tap, in whole groups."""
        return math.ceil(self.workload.x.channels / GROUP) * GROUP

    @property
    def depth(self) -> int:
        """Elements of k."""
        return self.workload.kernel[0] * self.workload.kernel[1] * self.tap_channels

    @property
    def steps(self) -> int:
        return math.ceil(self.depth / STEP)

    @property
    def column_tiles(self) -> int:
        return math.ceil(self.workload.y.channels / self.tile.columns)

    @property
    def padded_channels(self) -> int:
        """Output channels of the packed weight, bias and multiplier."""
        return self.column_tiles * self.tile.columns

    @property
    def pixels(self) -> int:
        """Outputs of one image and channel."""
        return self.workload.y.height * self.workload.y.width


def fits(workload: Conv2d) -> bool:
    """True for convolutions that are one matrix product."""
    return workload.groups == 1 and workload.x.dtype == "uint8"


def _cost(workload: Conv2d, tile: Tile, arch: Arch) -> float:
    """Time in arbitrary units: waves of blocks, each as long as its tile's copies and products."""
    m = (workload.y.batch or _ASSUMED_BATCH) * workload.y.height * workload.y.width
    blocks = math.ceil(m / tile.rows) * math.ceil(workload.y.channels / tile.columns)
    resident = max(1, min(arch.shared_bytes * 2 // tile.shared_bytes, 1024 // tile.threads))
    products = tile.rows * tile.columns
    copies = 24 * (
        tile.rows + tile.columns
    )  # per byte of k; a multiprocessor's products a byte it loads
    waves = math.ceil(blocks / arch.multiprocessors)
    # blocks of one multiprocessor share its tensor cores and hide each other's latency
    return waves * (products + copies) + 4096 * math.ceil(waves / resident)


def plan_conv(workload: Conv2d, arch: Arch, tile: Tile | None = None) -> ConvPlan:
    """The tile of least estimated time, or the given one."""
    x = workload.x
    tap = math.ceil(x.channels / GROUP) * GROUP
    vector = math.gcd(tap, x.channel_stride, x.first_channel, WIDEST)
    best = tile or min(TILES, key=lambda candidate: _cost(workload, candidate, arch))
    return ConvPlan(workload, best, vector)
