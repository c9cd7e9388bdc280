"""int8 convolution on tensor cores, run by the interpreter: bit for bit the definition."""

from __future__ import annotations

import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.cuda.conv_plan import TILES, Tile, tiles_of
from tests.backends.cuda.harness import CONV_SHAPES, ConvCase, conv_workload

SMALL = Tile(32, 32, (2, 2))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile: Tile) -> None:
    case = ConvCase(conv_workload((20, 40)))
    assert (case.by_tensor_cores(tile) == case.expected()).all()


@pytest.mark.parametrize("workload", CONV_SHAPES.values(), ids=CONV_SHAPES)
def test_shapes(workload: Conv2d) -> None:
    case = ConvCase(workload)
    assert (case.by_tensor_cores(SMALL) == case.expected()).all()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("zero_point", [-7, 0])
def test_signed_bytes(zero_point: int, arch: str) -> None:
    workload = conv_workload((20, 37), dtype="int8", x_zero_point=zero_point, residual=True)
    case = ConvCase(workload)
    assert (case.by_tensor_cores(SMALL, ARCHS[arch]) == case.expected()).all()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_a_zero_point_of_zero(arch: str) -> None:
    """The copies fill in zeros themselves; 3 channels of a group of 4, whose last one is anything."""
    case = ConvCase(conv_workload((3, 17), x_zero_point=0))
    assert (case.by_tensor_cores(SMALL, ARCHS[arch]) == case.expected()).all()


def test_a_residual_sum_is_added_on_the_way_out() -> None:
    case = ConvCase(conv_workload((20, 37), residual=True))
    assert (case.by_tensor_cores(SMALL) == case.expected()).all()


def test_float_results() -> None:
    case = ConvCase(conv_workload((20, 37), floats=True))
    assert (case.by_tensor_cores(SMALL) == case.expected()).all()


def test_a_batch_that_is_known_only_at_the_call() -> None:
    case = ConvCase(conv_workload((16, 16), batch=None), batch=3)
    assert (case.by_tensor_cores(SMALL) == case.expected()).all()


@pytest.mark.parametrize("zero_point", [0, 11])
def test_turing_copies_at_once_into_two_stages(zero_point: int) -> None:
    case = ConvCase(conv_workload((36, 16), x_zero_point=zero_point))
    turing = ARCHS["sm_75"]
    tile = tiles_of(turing)[-1]
    assert (tile.rows, tile.stages) == (32, 2)
    assert (case.by_tensor_cores(tile, turing) == case.expected()).all()


def test_extremes_do_not_saturate() -> None:
    """255 * 127 and 255 * -128 over the whole depth: an instruction that saturated would show."""
    case = ConvCase(conv_workload((64, 16), kernel=(1, 1), padding=(0, 0)))
    case.x[...] = 255
    case.weight[::2], case.weight[1::2] = 127, -128
    case.multiplier[...] = 1e-4
    assert (case.by_tensor_cores(SMALL) == case.expected()).all()
