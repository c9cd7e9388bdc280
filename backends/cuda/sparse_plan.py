"""Whether a convolution whose weights are pruned 2:4 takes sparse tensor cores, and how it is cut for them.

``mma.sp`` makes twice as many products a cycle as ``mma``, and a channel's weights are 40 bytes a step with their metadata,
not 64. What stays is the loads of x, the rounding of outputs, the latency of a step where blocks are few, and main memory: layers
deep and wide gain most; one that waits for memory, or that is over in no time, gains nothing. Both are estimated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.conv_plan import (
    ASSUMED_BATCH,
    GROUP,
    STEP,
    ConvPlan,
    Tile,
    cycles,
    plan_conv,
    possible,
)
from graphopt.backends.cuda.products import item_bytes
from graphopt.backends.cuda.sparse_fragments import SHAPES
from graphopt.backends.cuda.sparse_pack import FRAGMENT_BYTES, ROWS, is_two_of_four

Array = np.ndarray[Any, Any]

_MEMORY_RATE = 12  # bytes a cycle and multiprocessor from main memory (A100: 1555 GB/s, 108 of them at 1.4 GHz)
_CALL_CYCLES = 2000  # from one kernel to the next
_GAIN = 0.95  # of the dense form's time, above which a layer stays dense
_CHANNEL_BYTES = FRAGMENT_BYTES // ROWS  # of a step


@dataclass(frozen=True)
class SparseTile(Tile):
    """``rows`` pixels x ``columns`` channels; a warp has whole products of 8 x 16."""

    @property
    def step_bytes(self) -> int:
        return self.rows * STEP + self.columns * _CHANNEL_BYTES

    @property
    def fragment_bytes(self) -> int:
        warp = self.warp_rows * STEP + self.warp_columns * _CHANNEL_BYTES
        return self.threads // 32 * warp

    @property
    def speed(self) -> int:
        return 2

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, fragments of one step, addresses."""
        sums = self.warp_rows * self.warp_columns // 32
        return sums + self.warp_rows // 2 + self.warp_columns * 5 // 16 + 56


# A warp of 64 x 64 outputs reads 6.5 KB of shared memory for 32 products, in whose time it could read 8 KB.
TILES = (
    SparseTile(256, 128, (4, 2)),
    SparseTile(128, 256, (2, 4)),
    SparseTile(128, 128, (2, 2)),
    SparseTile(256, 64, (4, 1)),
    SparseTile(128, 64, (2, 2)),
    SparseTile(64, 128, (2, 2)),
    SparseTile(64, 64, (2, 2)),
    SparseTile(128, 32, (4, 1)),
    SparseTile(32, 64, (2, 2)),
    SparseTile(64, 32, (4, 1)),
    SparseTile(32, 32, (2, 2)),
)


def _bytes(layout: Layout | None) -> int:
    if layout is None:
        return 0
    pixels = (layout.batch or ASSUMED_BATCH) * layout.height * layout.width
    return pixels * layout.channels * item_bytes(layout.dtype)


def _time(plan: ConvPlan, arch: Arch) -> float:
    """Cycles of a call: of its blocks, or of main memory."""
    workload, tile = plan.workload, plan.tile
    weight = plan.steps * (tile.step_bytes - tile.rows * STEP) * plan.column_tiles
    moved = weight + sum(map(_bytes, (workload.x, workload.y, workload.residual)))
    return _CALL_CYCLES + max(cycles(plan, arch), moved / (_MEMORY_RATE * arch.multiprocessors))


def plan_sparse(workload: Conv2d, arch: Arch, tile: SparseTile | None = None) -> ConvPlan:
    """The tile of least estimated time, or the given one."""
    plans = [plan_conv(workload, arch, one) for one in ((tile,) if tile else TILES)]
    found = [plan for plan in plans if tile or possible(plan.tile, arch, plan.vector)]
    return min(found, key=lambda plan: cycles(plan, arch))


@dataclass(frozen=True)
class SparseForm:
    """The sparse form of a layer; ``gain`` is the dense form's estimated time over its own."""

    plan: ConvPlan
    gain: float

    @property
    def pays(self) -> bool:
        return _GAIN * self.gain > 1


def sparse_form(dense: ConvPlan, weight: Array, arch: Arch) -> SparseForm | None:
    """That of the layer of a dense plan; None on chips without such tensor cores, and of a weight (OIHW) that is not 2:4.

    Groups of four are of one tap: float16 channels that do not come in fours have none.
    """
    whole = dense.tap_channels % GROUP == 0 and dense.product.name in SHAPES
    if not arch.sparse or not whole or not is_two_of_four(weight):
        return None
    plan = plan_sparse(dense.workload, arch)
    return SparseForm(plan, _time(dense, arch) / _time(plan, arch))
