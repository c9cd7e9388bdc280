"""Whether a convolution whose weights are pruned 2:4 takes sparse tensor cores, and how it is cut for them.

``mma.sp`` makes twice as many products a cycle as ``mma``, and a channel's weights are 40 bytes a step with their metadata,
not 64. What stays is what x takes, the rounding of an output, the latency of a step where blocks are few, and main memory: deep
layers gain most; one that waits for memory, or that is over in no time, gains nothing. Both forms are estimated alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.conv_plan import STEP, ConvPlan, Tile, plan_conv
from graphopt.backends.cuda.sparse_pack import FRAGMENT_BYTES, ROWS, is_two_of_four

Array = np.ndarray[Any, Any]

_STAGES = 4
_SHARED_BYTES = 48 * 1024

# Of one multiprocessor (A100): products a cycle, bytes a cycle into shared memory and from main memory
_PRODUCTS, _COPIED, _MEMORY = 2048, 85, 12
# Cycles from one kernel to the next, of a step that only other blocks hide, and of an output: its conversions, clamps, stores
_CALL_CYCLES, _STEP_CYCLES, _ROUNDING_CYCLES = 2000, 128, 3 / 32
_ASSUMED_BATCH = 8  # of a dynamic one
_GAIN = 0.95  # of the dense form's time, above which a layer stays dense


@dataclass(frozen=True)
class SparseTile(Tile):
    """``rows`` pixels x ``columns`` channels; a warp has whole products of 8 x 16."""

    @property
    def step_bytes(self) -> int:
        """Shared memory of one step: windows and fragments."""
        return self.rows * STEP + self.columns // ROWS * FRAGMENT_BYTES

    @property
    def stages(self) -> int:
        return min(_STAGES, _SHARED_BYTES // self.step_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.step_bytes


# A warp of 64 x 64 outputs reads 6.5 KB of shared memory for 32 products, in whose time it could read 8 KB.
TILES = (
    SparseTile(128, 128, (2, 2)),
    SparseTile(128, 64, (2, 2)),
    SparseTile(64, 128, (2, 2)),
    SparseTile(64, 64, (2, 2)),
    SparseTile(128, 32, (4, 1)),
    SparseTile(32, 64, (2, 2)),
    SparseTile(64, 32, (4, 1)),
    SparseTile(32, 32, (2, 2)),
)


def _bytes(layout: Layout | None, batch: int) -> int:
    if layout is None:
        return 0
    size = 4 if layout.dtype == "float32" else 1
    return batch * layout.height * layout.width * layout.channels * size


def cycles(plan: ConvPlan, arch: Arch) -> float:
    """Estimated time of a convolution on tensor cores, sparse ones where its tile is for them."""
    workload, tile = plan.workload, plan.tile
    sparse = isinstance(tile, SparseTile)
    batch = workload.y.batch or _ASSUMED_BATCH
    blocks = math.ceil(batch * plan.pixels / tile.rows) * plan.column_tiles
    waves = math.ceil(blocks / arch.multiprocessors)
    resident = max(1, min(arch.shared_bytes * 2 // tile.shared_bytes, 1024 // tile.threads))
    channel_bytes = FRAGMENT_BYTES // ROWS if sparse else STEP
    outputs = tile.rows * tile.columns
    products = outputs * STEP / (_PRODUCTS * (2 if sparse else 1))
    copies = (tile.rows * STEP + tile.columns * channel_bytes) / _COPIED
    # blocks of one multiprocessor share its tensor cores and hide each other's latency
    latency = _STEP_CYCLES * math.ceil(waves / resident)
    compute = plan.steps * (waves * (products + copies) + latency)
    compute += waves * outputs * _ROUNDING_CYCLES
    tensors = (workload.x, workload.y, workload.residual)
    moved = sum(_bytes(layout, batch) for layout in tensors)
    moved += plan.padded_channels * plan.steps * channel_bytes
    return _CALL_CYCLES + max(compute, moved / (_MEMORY * arch.multiprocessors))


def plan_sparse(workload: Conv2d, arch: Arch, tile: SparseTile | None = None) -> ConvPlan:
    """The tile of least estimated time, or the given one."""
    candidates = [plan_conv(workload, arch, one) for one in ((tile,) if tile else TILES)]
    return min(candidates, key=lambda plan: cycles(plan, arch))


def choose_sparse(dense: ConvPlan, weight: Array, arch: Arch) -> ConvPlan | None:
    """How to cut the layer of a dense plan for sparse tensor cores, or None where it stays dense.

    That is on chips without them, of weights (OIHW) that are not 2:4, and where little is gained.
    """
    if not arch.sparse or not is_two_of_four(weight):
        return None
    plan = plan_sparse(dense.workload, arch)
    return plan if cycles(plan, arch) < _GAIN * cycles(dense, arch) else None
