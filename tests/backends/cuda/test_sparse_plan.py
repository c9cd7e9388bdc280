"""Which layers take sparse tensor cores: those pruned 2:4 that gain by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.conv_plan import ConvPlan, plan_conv
from graphopt.backends.cuda.sparse_plan import TILES, SparseTile, choose_sparse, cycles, plan_sparse
from tests.backends.cuda.harness import AMPERE, conv_workload
from tests.backends.cuda.sparse_harness import prune

POINT: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
DEEP = conv_workload((256, 256), size=(14, 14), batch=32)


def _chosen(workload: Conv2d, arch: Arch = AMPERE, most: int = 2) -> ConvPlan | None:
    rng = np.random.default_rng(0)
    weight = np.ones((workload.y.channels, workload.x.channels, *workload.kernel), np.int8)
    return choose_sparse(plan_conv(workload, arch), prune(weight, rng, most), arch)


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90"])
def test_a_deep_layer_is_sparse(name: str) -> None:
    arch = ARCHS[name]
    plan = _chosen(DEEP, arch)
    assert plan is not None
    assert isinstance(plan.tile, SparseTile)
    assert 1.3 < cycles(plan_conv(DEEP, arch), arch) / cycles(plan, arch) < 2


def test_turing_has_no_sparse_tensor_cores() -> None:
    assert _chosen(DEEP, ARCHS["sm_75"]) is None


def test_weights_that_are_not_pruned_so() -> None:
    assert _chosen(DEEP, most=3) is None


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((64, 256), size=(56, 56), batch=32, residual=True, **POINT),
        conv_workload((8, 16), size=(16, 16), batch=1, **POINT),
    ],
    ids=["waits for memory", "over in no time"],
)
def test_layers_that_gain_nothing_stay_dense(workload: Conv2d) -> None:
    assert _chosen(workload) is None


def test_a_deeper_layer_gains_more() -> None:
    gains = []
    for channels in (64, 256, 1024):
        workload = conv_workload((channels, 256), size=(28, 28), batch=32)
        dense, sparse = plan_conv(workload, AMPERE), plan_sparse(workload, AMPERE)
        gains.append(cycles(dense, AMPERE) / cycles(sparse, AMPERE))
    assert gains == sorted(gains)
    assert gains[0] < gains[-1] < 2


def test_a_large_layer_gets_a_large_tile_and_a_small_one_many_blocks() -> None:
    assert plan_sparse(DEEP, AMPERE).tile.rows == 128
    small = conv_workload((128, 128), size=(7, 7), batch=1)
    assert plan_sparse(small, AMPERE).tile.rows == 32


@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: SparseTile) -> None:
    assert tile.shared_bytes <= min(arch.shared_bytes for arch in ARCHS.values())
    assert tile.stages >= 3
    assert tile.warp_rows % 8 == 0
    assert tile.warp_columns % 16 == 0
