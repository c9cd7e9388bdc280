"""Plans: tiles that fit the registers, merged groups, spans and shares for threads."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends.cpu.conv_plan import ConvChoice, chunk_tiles, plan_conv2d
from graphopt.backends.cpu.workload import Epilogue
from graphopt.backends.x86.isa import ISAS
from graphopt.errors import CompileError
from tests.backends.cpu.conv_harness import conv_workload

VNNI = ISAS["avx512-vnni"]


@pytest.mark.parametrize("row", ISAS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_tiles_fit_the_registers(row, dtype: str) -> None:
    """Accumulators, a step's weights, the spread pixel, and a product where it does not accumulate."""
    halves = 1 if dtype == "float32" else 4 // row.dot_group
    accumulates = row.fma if dtype == "float32" else row.dot_accumulates
    for pixels, vectors in row.tiles(dtype):
        live = pixels * vectors + halves * vectors + halves + (not accumulates)
        assert live <= row.registers
    assert len(set(row.tiles(dtype))) == len(row.tiles(dtype))


def test_known_tiles() -> None:
    assert (14, 2) in VNNI.tiles("uint8")
    assert (7, 4) not in VNNI.tiles("uint8")  # spills
    wide = plan_conv2d(conv_workload((64, 64), (56, 56)), VNNI)
    assert (wide.pixels, wide.vectors) == (8, 2)
    narrow = plan_conv2d(conv_workload((512, 512), (7, 7)), VNNI)
    assert narrow.pixels == 7


def test_pixels_that_share_an_l1_set_get_a_short_tile() -> None:
    pointwise: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0), "dtype": "float32"}
    aliased = plan_conv2d(conv_workload((1024, 32), (28, 28), **pointwise), VNNI)
    clear = plan_conv2d(conv_workload((1040, 32), (28, 28), **pointwise), VNNI)
    assert aliased.pixels <= 7 < clear.pixels


def test_a_float_tile_touches_few_lines_at_once() -> None:
    """A short sum of a wide layer: 7 pixels where the int8 tile has 14, fewer with a residual."""
    pointwise: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0), "dtype": "float32"}
    plain = plan_conv2d(conv_workload((64, 256), (56, 56), **pointwise), VNNI)
    fused = Epilogue(float_residual=True)
    residual = plan_conv2d(conv_workload((64, 256), (56, 56), epilogue=fused, **pointwise), VNNI)
    assert residual.pixels * residual.vectors < plain.pixels * plain.vectors <= 14


def test_groups_share_a_vector_up_to_its_lanes() -> None:
    plan = plan_conv2d(conv_workload((32, 32), groups=8), VNNI)
    assert (plan.groups, plan.in_channels, plan.out_channels) == (2, 16, 16)
    wide = plan_conv2d(conv_workload((64, 64), groups=2), VNNI)
    assert (wide.groups, wide.in_channels, wide.out_channels) == (2, 32, 32)


def test_window_columns_are_one_span_where_they_touch() -> None:
    merged = plan_conv2d(conv_workload((3, 8), kernel=(7, 7), x_channel_stride=4), VNNI)
    assert (merged.taps_high, merged.taps_wide, merged.span) == (7, 1, 28)
    dilated = plan_conv2d(conv_workload((8, 8), dilation=(1, 2)), VNNI)
    assert (dilated.taps_high, dilated.taps_wide, dilated.span) == (3, 3, 8)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_get_equal_shares(threads: int) -> None:
    workload = conv_workload((16, 40), (24, 24))
    plan = plan_conv2d(workload, VNNI)
    tiles = 24 * -(-24 // plan.pixels)
    chunk = chunk_tiles(workload, plan, VNNI, tiles, tiles, threads)
    tasks = -(-tiles // chunk) * plan.blocks
    assert tasks % threads == 0 or tasks >= 8 * threads


def test_a_choice_takes_the_place_of_the_cost_model() -> None:
    workload = conv_workload((16, 40), (24, 24))
    plan = plan_conv2d(workload, VNNI, ConvChoice(5, 3, chunk=7))
    assert (plan.pixels, plan.vectors) == (5, 3)
    assert chunk_tiles(workload, plan, VNNI, 120, 120, threads=2) == 7
    assert chunk_tiles(workload, plan, VNNI, 4, 4, threads=2) == 4
    assert chunk_tiles(workload, plan, VNNI, None, 120, threads=2) == 7


@pytest.mark.parametrize(
    "choice", [ConvChoice(8, 4), ConvChoice(25, 1), ConvChoice(4, 4), ConvChoice(4, 2, chunk=-1)]
)
def test_refuses_a_choice_that_spills_or_is_larger_than_the_output(choice: ConvChoice) -> None:
    with pytest.raises(CompileError) as caught:
        plan_conv2d(conv_workload((16, 40), (24, 24)), VNNI, choice)
    assert str(caught.value) == (
        f"conv2d cannot be cut by {choice!r} on avx512-vnni, for 24 pixels by 3 channel vectors; leave the choice out"
    )
