"""Which tile a convolution gets, and what bounds it."""

from __future__ import annotations

import pytest

from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.conv_plan import TILES, Tile, bounds, plan_conv, possible
from tests.backends.cuda.harness import AMPERE, conv_workload

EVERY_ARCH = pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
LARGE = conv_workload((256, 256), size=(56, 56), batch=32)


def test_a_large_layer_gets_a_large_tile_and_a_small_one_many_blocks() -> None:
    small = conv_workload((128, 128), size=(7, 7), batch=1)
    for name in ("sm_80", "sm_90"):
        tile = plan_conv(LARGE, ARCHS[name]).tile
        assert (tile.warp_rows, tile.warp_columns) == (64, 64)
        assert plan_conv(small, ARCHS[name]).tile.rows == 32


def test_few_output_channels_get_a_narrow_tile() -> None:
    assert plan_conv(conv_workload((64, 64), size=(56, 56), batch=32), AMPERE).tile.columns == 64
    assert plan_conv(conv_workload((64, 24), size=(56, 56), batch=32), AMPERE).tile.columns == 32


@EVERY_ARCH
def test_a_tile_fits_its_chip(arch: Arch) -> None:
    for channels in (3, 20, 64, 512):
        for size in (7, 28, 112):
            workload = conv_workload((channels, channels), size=(size, size), batch=8)
            plan = plan_conv(workload, arch)
            assert plan.shared_bytes <= arch.dynamic_bytes
            assert plan.tile.threads * plan.tile.registers <= 65536
            assert plan.tile.registers <= 255


def test_turing_has_no_large_warps() -> None:
    assert not possible(TILES[0], ARCHS["sm_75"], 16)
    tile = plan_conv(LARGE, ARCHS["sm_75"]).tile
    assert tile.warp_rows * tile.warp_columns <= 64 * 32


def test_a_thread_has_few_windows() -> None:
    """Copies of 4 bytes: 16 of them a row and step, so that 128 threads of a tile of 128 rows would have 16 windows each."""
    four_warps = Tile(128, 128, (2, 2))
    assert possible(four_warps, AMPERE, 16)
    assert not possible(four_warps, AMPERE, 4)
    tile = plan_conv(conv_workload((3, 128), size=(112, 112), batch=32), AMPERE).tile
    assert tile.rows * 16 // tile.threads <= 8


def test_bounds_by_hand() -> None:
    """256 x 128 outputs, eight warps of 64 x 64: 2**21 products of a step at 2048 a cycle; 8 KB a warp and 24 KB of copies."""
    found = bounds(TILES[0], AMPERE)
    assert found == {"tensor": 1024, "shared": (8 * 8192 + 24576) / 128, "loads": 768}
    # the same outputs by warps of 64 x 32 read half as much again: shared memory is no longer faster than the products
    assert bounds(Tile(128, 128, (2, 4)), AMPERE)["shared"] == 512
    assert bounds(Tile(128, 128, (2, 4)), AMPERE)["tensor"] == 512
    assert bounds(Tile(128, 128, (2, 2)), AMPERE)["shared"] == 384


def test_stages() -> None:
    """More than three only where all of them may be declared statically."""
    assert [tile.stages for tile in TILES] == [3, 3, 3, 3, 3, 4, 4, 6, 4, 8, 8, 8]
    assert all(tile.shared_bytes <= 48 * 1024 for tile in TILES if tile.stages > 3)
