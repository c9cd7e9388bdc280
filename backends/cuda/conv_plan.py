"""How a convolution is cut for tensor cores: the block's tile, its warps, what one copy moves, how weights lie.

``y[m, o] = sum_k x[m, k] * w[o, k]`` with ``m = (image, row, column)`` and ``k = (tap row, tap column, channel)``, the
channels of a tap in whole groups of four bytes where x lies so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.memory import INDEX_LIMIT, WIDEST
from graphopt.backends.cuda.products import Product, item_bytes, product_of

STEP = 64  # bytes of k that a block multiplies between two barriers
_FEWEST_STAGES = 3  # tiles in shared memory: one is read, two are on their way; more where all may be declared statically
_STATIC_BYTES = 48 * 1024
STAGING_PAD = 16  # bytes between rows of staged outputs, against bank conflicts
GROUP = 4  # bytes
ASSUMED_BATCH = 8  # of a dynamic one
_TURING_OUTPUTS = 64 * 32  # of a warp
_SPLITS = (2, 3, 4, 6, 8)
_FEWEST_STEPS = 4  # of a part
_GAIN = 0.85  # of the time without a second kernel, above which there is none
_MOST_WINDOWS = 8  # of a thread, three registers each

_SHARED_RATE = 128  # bytes a cycle of a multiprocessor: 32 banks of four
_LOAD_RATE = 32  # bytes a cycle from the L2 cache, a sector: about what every multiprocessor gets when all of them load
_LATENCY = 700  # cycles of a load from memory
_STEP_CYCLES = (
    128  # of a barrier, fragments and the products that wait for them, where a warp has no others
)
_REGISTERS = 65536  # of a multiprocessor
_RESERVED = 1024  # bytes of shared memory that a block takes beside its own
_SECOND_CYCLES = 3000  # of another kernel: from the end of one to the loads of the next, and these
_OUTPUT_CYCLES = 0.1  # of an output: a dozen instructions in 128 lanes


@dataclass(frozen=True)
class Tile:
    """``rows x columns`` outputs of a block, by ``warps[0] x warps[1]`` warps; at most ``most_stages`` steps in memory."""

    rows: int
    columns: int
    warps: tuple[int, int]
    most_stages: int = 8

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
    def step_bytes(self) -> int:
        """Shared memory of one step."""
        return (self.rows + self.columns) * STEP

    @property
    def stages(self) -> int:
        static = max(_FEWEST_STAGES, _STATIC_BYTES // self.step_bytes)
        return min(self.most_stages, static)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.step_bytes

    @property
    def fragment_bytes(self) -> int:
        """What the warps read of a step: each its rows and columns of the tile."""
        return self.threads // 32 * (self.warp_rows + self.warp_columns) * STEP

    @property
    def speed(self) -> int:
        """Products of k that take the time of one."""
        return 1

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, two parts' fragments, addresses."""
        sums = self.warp_rows * self.warp_columns // 32
        return sums + (self.warp_rows + self.warp_columns) // 2 + 56

    def held(self, arch: Arch) -> int:
        """Blocks that a multiprocessor holds at a time."""
        by_registers = _REGISTERS // (self.threads * self.registers)
        by_memory = (arch.dynamic_bytes + _RESERVED) // (self.shared_bytes + _RESERVED)
        return max(1, min(by_registers, by_memory))


# Largest first. Warps of 64 x 64 outputs read 8 KB of shared memory for 64 products, of 64 x 32 6 KB for 32.
TILES: tuple[Tile, ...] = (
    Tile(256, 128, (4, 2)),
    Tile(128, 256, (2, 4)),
    Tile(128, 128, (2, 2)),
    Tile(128, 128, (2, 4)),
    Tile(256, 64, (4, 1)),
    Tile(128, 64, (2, 2)),
    Tile(64, 128, (1, 4)),
    Tile(64, 64, (2, 2)),
    Tile(128, 32, (4, 1)),
    Tile(32, 64, (1, 4)),
    Tile(64, 32, (2, 2)),
    Tile(32, 32, (2, 2)),
)


@dataclass(frozen=True)
class ConvPlan:
    """A tile, the product it is made of, and the sizes that follow; ``vector`` bytes of x are copied at once.

    ``splits`` blocks share the steps of a tile where that is not 1, see ``conv_sums``.
    """

    workload: Conv2d
    tile: Tile
    product: Product
    splits: int = 1

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
        """Steps of a tile, of which every part has as many: the last ones may be zeros."""
        return math.ceil(self.depth / self.step_elements / self.splits) * self.splits

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """The sums of an image that several blocks make."""
        return self.splits, self.pixels, self.padded_channels

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, in whose place the outputs are staged, all but those of float32."""
        item = item_bytes(self.workload.y.dtype)
        staged = self.tile.rows * (self.tile.columns * item + STAGING_PAD) if item < 4 else 0
        return max(self.tile.shared_bytes, staged)

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


def tiles_of(arch: Arch) -> tuple[Tile, ...]:
    """Those of a chip. What passes through registers is a step ahead, however many stages there are."""
    return TILES if arch.async_copy else tuple(replace(tile, most_stages=2) for tile in TILES)


def possible(tile: Tile, arch: Arch, vector: int) -> bool:
    """True for a tile that the chip holds, and whose windows fit a thread's registers beside its sums."""
    windows = tile.rows * STEP // vector // tile.threads
    # Turing's copies pass through registers, which the sums of a large warp leave none of
    large = tile.warp_rows * tile.warp_columns > _TURING_OUTPUTS
    fits_chip = tile.shared_bytes <= arch.dynamic_bytes and (arch.async_copy or not large)
    return fits_chip and windows <= _MOST_WINDOWS


def bounds(tile: Tile, arch: Arch) -> dict[str, float]:
    """Cycles of one step of a block, if nothing but this took time: products, shared memory, loads from the L2 cache.

    Every byte of the tile is written once and read by all warps that need it.
    """
    return {
        "tensor": tile.rows * tile.columns * STEP / (arch.rate * tile.speed),
        "shared": (tile.fragment_bytes + tile.step_bytes) / _SHARED_RATE,
        "loads": tile.step_bytes / _LOAD_RATE,
    }


def cycles(plan: ConvPlan, arch: Arch) -> float:
    """Estimated time of the products and outputs of the multiprocessor that has most of them.

    Blocks that it holds together share its units and hide each other's beginning; a step of few of them takes as long as a
    copy's way from memory. Main memory moves the same bytes for every tile.
    """
    tile, workload = plan.tile, plan.workload
    outputs = (workload.y.batch or ASSUMED_BATCH) * plan.pixels
    blocks = math.ceil(outputs / tile.rows) * plan.column_tiles * plan.splits
    held = tile.held(arch)
    work = max(bounds(tile, arch).values())
    rounding = tile.rows * tile.columns * _OUTPUT_CYCLES

    def together(count: int) -> float:
        step = max(count * work, _LATENCY / (tile.stages - 1), _STEP_CYCLES)
        steps = plan.steps // plan.splits
        return _LATENCY / held + steps * step + count * rounding if count else 0

    rounds, rest = divmod(math.ceil(blocks / arch.multiprocessors), held)
    total = rounds * together(held) + together(rest)
    if plan.splits > 1:
        moved = 2 * outputs * plan.splits * plan.padded_channels * 4
        total += _SECOND_CYCLES + moved / (_LOAD_RATE * arch.multiprocessors)
    return total


def plan_conv(
    workload: Conv2d, arch: Arch, tile: Tile | None = None, product: Product | None = None
) -> ConvPlan:
    """The tile of least estimated time, or the given one, for a workload that ``fits`` the product (x's by default)."""
    product = product or product_of(workload.x.dtype)
    assert product is not None
    if tile is not None:
        return ConvPlan(workload, tile, product)
    plans = [ConvPlan(workload, candidate, product) for candidate in tiles_of(arch)]
    found = [plan for plan in plans if possible(plan.tile, arch, plan.vector)]
    return min(found, key=lambda plan: cycles(plan, arch))


def split_steps(plan: ConvPlan, arch: Arch) -> ConvPlan:
    """The plan, or one whose tiles several blocks share, where clearly less time is estimated for it.

    A batch that is known at the call only may be large: its plan stays.
    """
    batch = plan.workload.y.batch
    if batch is None:
        return plan
    plans = [
        replace(plan, tile=tile, splits=splits)
        for tile in tiles_of(arch)
        if possible(tile, arch, plan.vector)
        for splits in _SPLITS
    ]
    found = [
        candidate
        for candidate in plans
        if candidate.steps >= candidate.splits * _FEWEST_STEPS
        and batch * math.prod(candidate.sums_shape) < INDEX_LIMIT
    ]
    best = min([plan, *found], key=lambda candidate: cycles(candidate, arch))
    return best if cycles(best, arch) < _GAIN * cycles(plan, arch) else plan
