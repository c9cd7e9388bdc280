"""Winograd's F(4, 3): integers equal the definition bit for bit on every row of this CPU; floats keep 5 digits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.winograd import winograd
from graphopt.backends.cpu.winograd_plan import fits, is_faster, plan_winograd, sums_fit
from graphopt.backends.cpu.winograd_weights import pack_winograd, weight_transform
from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue
from tests.backends.cpu.conv_harness import (
    REQUANTIZE,
    RESIDUAL_ADD,
    Data,
    conv_workload,
    random_data,
    reference,
)
from tests.backends.cpu.stream_harness import ROWS, pack, run

RESIDUAL = Epilogue(requantize=REQUANTIZE, residual_add=RESIDUAL_ADD)

SHAPES: dict[str, Conv2d] = {
    "whole tiles": conv_workload((64, 64), (8, 12)),
    "smaller tiles, margins": conv_workload((16, 88), (5, 7), y_margin=1, y_channel_stride=96),
    "smaller tiles below": conv_workload((8, 20), (6, 8)),
    "smaller tiles on the right": conv_workload((8, 20), (8, 7)),
    "one tile": conv_workload((4, 16), (4, 4)),
    "odd channels": conv_workload((5, 21), (6, 9), x_channel_stride=8, y_channel_stride=24),
    "no padding": conv_workload((8, 20), (7, 9), padding=(0, 0)),
    "wide padding": conv_workload((8, 20), (7, 6), padding=(2, 2), x_extra=1),
    "residual": conv_workload((24, 40), (6, 7), epilogue=RESIDUAL),
    "dequantized": conv_workload((12, 33), (5, 5), epilogue=Epilogue()),
    "batch of 3": conv_workload((8, 36), (7, 5), batch=3),
    "many blocks": conv_workload((8, 200), (4, 4)),
}


CHUNKS = conv_workload(
    (64, 16), (41, 43)
)  # of its 121 tiles 2 chunks, each with some of another size


def _run(workload: Conv2d, row: Isa, data: Data, out: np.ndarray, threads: int = 1) -> np.ndarray:
    integer = workload.x.dtype == "uint8"
    multiplier = data.multiplier if integer else None
    taps, *rest = pack_winograd(workload, row, threads, data.weight, data.bias, multiplier)
    plan = plan_winograd(workload, row, threads)
    transformed = np.zeros(plan.packed_weights, "int32" if integer else "float32")
    weight = run(weight_transform(workload, row, threads), row, taps, out=transformed)
    arrays = [pack(workload.x, data.x), weight, *rest]
    if workload.residual is not None:
        arrays.append(pack(workload.residual, data.residual))
    return run(winograd(workload, row, threads), row, *arrays, out=out)


def _check_exact(
    workload: Conv2d, row: Isa, threads: int = 1, batch: int = 1, data: Data | None = None
) -> None:
    data = data or random_data(workload, batch=batch)
    expected = pack(workload.y, reference(workload, data).astype(workload.y.dtype))
    np.testing.assert_array_equal(_run(workload, row, data, expected, threads), expected)


def _check_close(workload: Conv2d, row: Isa, threads: int = 1, batch: int = 1) -> None:
    """Sums of unit variance: F(4, 3) multiplies the rounding of a direct sum (1e-6 here) by up to 10."""
    data = random_data(workload, batch=batch)
    expected = pack(workload.y, reference(workload, data).astype(np.float32))
    actual = _run(workload, row, data, expected, threads)
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_definition(name: str, row: Isa) -> None:
    assert fits(SHAPES[name])
    _check_exact(SHAPES[name], row)


def test_every_tile_has_every_point_of_its_size() -> None:
    for height in range(4, 13):
        for width in range(4, 13):
            workload = conv_workload((8, 20), (height, width))
            plan = plan_winograd(workload, ROWS[0], 1)
            pairs = {
                (tile, row, column)
                for part in plan.points
                for tile in range(part.first, part.end)
                for row in range(part.row_start, part.row_stop)
                for column in range(part.column_start, part.column_stop)
            }
            assert pairs == {
                (tile, row, column)
                for tiles in plan.cut
                for tile in range(tiles.first, tiles.end)
                for row in range(tiles.rows + 2)
                for column in range(tiles.columns + 2)
            }
            assert sum((t.end - t.first) * t.rows * t.columns for t in plan.cut) == height * width


@pytest.mark.parametrize("threads", [1, 2])
def test_smaller_tiles_in_chunks(threads: int) -> None:
    plan = plan_winograd(CHUNKS, ROWS[0], threads)
    assert plan.chunks > 1
    assert plan.chunk < plan.points[0].end - plan.points[0].first
    _check_exact(CHUNKS, ROWS[0], threads)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize("signs", ["equal", "alternating"])
def test_the_largest_values_do_not_overflow(row: Isa, size: int, signs: str) -> None:
    """Bytes 0 and 255 and weights +-127 in the patterns that make transformed inputs and weights largest."""
    workload = conv_workload((64, 20), (size, size), epilogue=Epilogue())
    data = random_data(workload)
    generator = np.random.default_rng(3)
    x = generator.integers(0, 2, data.x.shape) * 255
    weight = np.full(data.weight.shape, 127)
    if signs == "alternating":
        x[..., ::2, ::2] = 255
        x[..., 1::2, :] = 0
        weight[..., ::2, 1] = -127
        weight[..., 1, ::2] = -127
    extreme = replace(data, x=x.astype(np.uint8), weight=weight.astype(np.int8))
    assert sums_fit(extreme.weight)
    _check_exact(workload, row, data=extreme)


def test_sums_beyond_the_recoverable_range_are_refused() -> None:
    """255 * sum must stay below 2**25: 2**25 / (255 * 127) is 1,036 taps of one sign."""
    weight = np.zeros((3, 1036, 1, 1), np.int8)
    weight[1] = 127
    assert sums_fit(weight)
    assert sums_fit(-weight)
    more = np.full((3, 1037, 1, 1), 127, np.int8)
    assert not sums_fit(more)
    assert not sums_fit(-more)
    room = 2**25 - 1 - 255 * 127 * 1036
    assert sums_fit(weight, np.array([0, -room, 0], np.int32))
    assert not sums_fit(weight, np.array([0, room + 1, 0], np.int32))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["smaller tiles, margins", "batch of 3", "many blocks"])
def test_threads_share_the_work(name: str, threads: int) -> None:
    _check_exact(SHAPES[name], ROWS[0], threads)
    assert "T.parallel" in winograd(SHAPES[name], ROWS[0], threads).script()
    assert "T.parallel" not in winograd(SHAPES[name], ROWS[0], 1).script()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dynamic_batch(batch: int) -> None:
    _check_exact(conv_workload((8, 20), (6, 7), batch=None), ROWS[0], batch=batch)
    _check_close(conv_workload((8, 20), (6, 7), batch=None, dtype="float32"), ROWS[0], batch=batch)


FLOAT_SHAPES = {
    "whole tiles": conv_workload((48, 40), (8, 8), dtype="float32"),
    "smaller tiles, margins": conv_workload((7, 21), (5, 9), dtype="float32", y_margin=1),
    "residual": conv_workload(
        (12, 33), (6, 6), dtype="float32", epilogue=Epilogue(float_residual=True)
    ),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", FLOAT_SHAPES)
def test_float_agrees_with_float64(name: str, row: Isa) -> None:
    _check_close(FLOAT_SHAPES[name], row)


def test_float_bits_do_not_depend_on_threads() -> None:
    workload = conv_workload((16, 40), (13, 15), dtype="float32", batch=2)
    data = random_data(workload)
    out = pack(workload.y, reference(workload, data).astype(np.float32))
    one, *more = (_run(workload, ROWS[0], data, out, threads) for threads in (1, 2, 2, 3))
    for other in more:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations(activation: str, dtype: str) -> None:
    """Also in smaller tiles: a pixel must be activated once."""
    epilogue = Epilogue(activation=Activation(activation))
    workload = conv_workload((8, 21), (6, 7), dtype=dtype, epilogue=epilogue)
    data = random_data(workload)
    value = reference(replace(workload, epilogue=Epilogue()), data).astype(np.float64)
    wanted = np.maximum(value, 0) if activation == "relu" else value / (1 + np.exp(-value))
    expected = pack(workload.y, wanted.astype(np.float32))
    actual = _run(workload, ROWS[0], data, expected)
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((8, 16), (8, 8), stride=(2, 2)),
        conv_workload((8, 16), (9, 9), dilation=(2, 2)),
        conv_workload((8, 16), (8, 8), groups=2),
        conv_workload((8, 16), (8, 8), kernel=(3, 1)),
        conv_workload((8, 16), (3, 8)),
        conv_workload((3, 16), (8, 8)),
    ],
    ids=["stride", "dilation", "groups", "kernel", "small map", "odd channels without a pad"],
)
def test_declines(workload: Conv2d) -> None:
    assert not fits(workload)


def test_chosen_where_weights_are_read_often_enough() -> None:
    """Measured on AVX-512 VNNI: 1.5 times the direct form at 56 x 56 x 64, under half of it at 7 x 7 x 512."""
    row = ROWS[0]
    assert is_faster(conv_workload((64, 64), (56, 56)), row, 1)
    assert is_faster(conv_workload((128, 128), (28, 28), dtype="float32"), row, 1)
    assert not is_faster(conv_workload((512, 512), (7, 7)), row, 1)
    assert not is_faster(conv_workload((4, 16), (7, 7)), row, 1)


@st.composite
def workloads(draw: st.DrawFn) -> Conv2d:
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    height, width = (draw(st.integers(max(4, 6 - 2 * p), 14)) for p in padding)
    channels = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    integer = draw(st.booleans())
    epilogues = [Epilogue(requantize=REQUANTIZE), RESIDUAL, Epilogue()]
    if not integer:
        epilogues = [Epilogue(), Epilogue(float_residual=True)]
    return conv_workload(
        channels,
        (height, width),
        padding=padding,
        dtype="uint8" if integer else "float32",
        epilogue=draw(st.sampled_from(epilogues)),
        batch=draw(st.sampled_from([1, 2, None])),
        x_channel_stride=-(-channels[0] // 4) * 4 if integer else 0,
        y_margin=draw(st.integers(0, 1)),
        y_channel_stride=channels[1] + draw(st.integers(0, 3)),
        x_extra=draw(st.integers(0, 1)),
    )


@settings(max_examples=15)
@given(workloads(), st.sampled_from(ROWS), st.integers(1, 2))
def test_random_workloads(workload: Conv2d, row: Isa, threads: int) -> None:
    check = _check_exact if workload.x.dtype == "uint8" else _check_close
    check(workload, row, threads, batch=2)


def test_the_function_is_named_after_its_workload() -> None:
    function = winograd(SHAPES["whole tiles"], ROWS[0], 1)
    assert isinstance(function, tvm.tirx.PrimFunc)
    assert str(function.attrs["global_symbol"]).startswith("winograd_u8s8_8x12x64_64_")
