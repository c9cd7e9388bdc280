"""Which layers take sparse tensor cores: those pruned 2:4 that gain by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.conv_plan import bounds, plan_conv
from graphopt.backends.cuda.sparse_plan import (
    TILES,
    SparseForm,
    SparseTile,
    plan_sparse,
    sparse_form,
)
from tests.backends.cuda.harness import AMPERE, conv_workload
from tests.backends.cuda.sparse_harness import prune

POINT: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
DEEP = conv_workload((512, 512), size=(28, 28), batch=32)


def _form(workload: Conv2d, arch: Arch = AMPERE, most: int = 2) -> SparseForm | None:
    rng = np.random.default_rng(0)
    weight = np.ones((workload.y.channels, workload.x.channels, *workload.kernel), np.int8)
    return sparse_form(plan_conv(workload, arch), prune(weight, rng, most), arch)


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90"])
def test_a_deep_layer_is_sparse(name: str) -> None:
    form = _form(DEEP, ARCHS[name])
    assert form is not None
    assert form.pays
    assert isinstance(form.plan.tile, SparseTile)
    assert 1.2 < form.gain < 2


def test_turing_has_no_sparse_tensor_cores() -> None:
    assert _form(DEEP, ARCHS["sm_75"]) is None


def test_weights_that_are_not_pruned_so() -> None:
    assert _form(DEEP, most=3) is None


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((64, 256), size=(56, 56), batch=32, residual=True, **POINT),
        conv_workload((128, 128), size=(7, 7), batch=1),
        conv_workload((8, 16), size=(16, 16), batch=1, **POINT),
    ],
    ids=["waits for memory", "few blocks", "over in no time"],
)
def test_layers_that_gain_nothing_stay_dense(workload: Conv2d) -> None:
    form = _form(workload)
    assert form is not None
    assert not form.pays


def test_a_deeper_layer_gains_more() -> None:
    gains = []
    for channels in (16, 64, 256, 1024):
        workload = conv_workload((channels, 512), size=(28, 28), batch=32)
        form = _form(workload)
        assert form is not None
        gains.append(form.gain)
    assert gains == sorted(gains)
    assert gains[0] < gains[-1] < 2


def test_bounds_by_hand() -> None:
    """128 x 256 outputs, eight warps of 64 x 64: 2**21 products of a step at 4096 a cycle; 64 bytes a pixel, 40 a channel."""
    found = bounds(SparseTile(128, 256, (2, 4)), AMPERE)
    copies, warps = 128 * 64 + 256 * 40, 8 * (64 * 64 + 64 * 40)
    assert found == {"tensor": 512, "shared": (copies + warps) / 128, "loads": copies / 32}


def test_a_large_layer_gets_a_large_tile_and_a_small_one_many_blocks() -> None:
    tile = plan_sparse(DEEP, AMPERE).tile
    assert (tile.warp_rows, tile.warp_columns) == (64, 64)
    small = conv_workload((128, 128), size=(7, 7), batch=1)
    assert plan_sparse(small, AMPERE).tile.rows == 32


@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: SparseTile) -> None:
    assert tile.shared_bytes <= min(arch.dynamic_bytes for arch in ARCHS.values() if arch.sparse)
    assert tile.registers <= 255
    assert tile.threads * tile.registers <= 65536
    assert tile.warp_rows % 8 == 0
    assert tile.warp_columns % 16 == 0
