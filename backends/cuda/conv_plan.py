"""How a convolution is cut for tensor cores: the block's tile, its warps, what one copy moves, how weights lie.

``y[m, o] = sum_k x[m, k] * w[o, k]`` with ``m = (image, row, column)`` and ``k = (tap row, tap column, channel)``, the
channels of a tap in whole groups of four bytes where x lies so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.memory import WIDEST
from graphopt.backends.cuda.products import Product, product_of

STEP = 64  # bytes of k that a block multiplies between two barriers
STAGES = 3  # tiles in shared memory: one is read, two are on their way
GROUP = 4  # bytes


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
    """A tile, the product it is made of, and the sizes that follow; ``vector`` bytes of x are copied at once."""

    workload: Conv2d
    tile: Tile
    product: Product

    @property
    def tap_channels(self) -> int:
        """Channels of a tap, in whole groups."""
        return _tap_channels(self.workload.x, self.product)

    @property
    def vector(self) -> int:
        x, size = self.workload.x, self.product.item_bytes
        elements = math.gcd(self.tap_channels, x.channel_stride, x.first_channel)
        return math.gcd(elements * size, WIDEST)

    @property
    def step_elements(self) -> int:
        """Elements of k in a step."""
        return STEP // self.product.item_bytes

    @property
    def depth(self) -> int:
        """Elements of k."""
        return self.workload.kernel[0] * self.workload.kernel[1] * self.tap_channels

    @property
    def steps(self) -> int:
        return math.ceil(self.depth / self.step_elements)

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


def _tap_channels(x: Layout, product: Product) -> int:
    group = GROUP // product.item_bytes
    if product.item_bytes > 1 and (x.channel_stride % group or x.first_channel % group):
        group = 1  # a pixel of odd float16 channels begins within a word
    return math.ceil(x.channels / group) * group


def fits(workload: Conv2d, product: Product | None = None) -> bool:
    """True for convolutions that are one matrix product, by default of x's own type: float32 must ask for tf32.

    The residual of a float product has the type of its output.
    """
    product = product or product_of(workload.x.dtype)
    if product is None or workload.groups != 1 or workload.x.dtype != product.x:
        return False
    residual = workload.residual
    return product.is_integer or residual is None or residual.dtype == workload.y.dtype


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


def plan_conv(
    workload: Conv2d, arch: Arch, tile: Tile | None = None, product: Product | None = None
) -> ConvPlan:
    """The tile of least estimated time, or the given one, for a workload that ``fits`` the product (x's by default)."""
    product = product or product_of(workload.x.dtype)
    assert product is not None
    best = tile or min(TILES, key=lambda candidate: _cost(workload, candidate, arch))
    return ConvPlan(workload, best, product)
