"""Sparse kernels: int8 equals the definition on the masked weights bit for bit, on every row of this CPU; floats are close."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.sparse import function_name, sparse
from graphopt.backends.cpu.sparse_forms import as_planar, compare, rounds_in_range
from graphopt.backends.cpu.sparse_pack import density, pack_sparse
from graphopt.backends.cpu.sparse_plan import SparseChoice, fits, plan_sparse
from graphopt.backends.cpu.sparse_products import AHEAD
from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue, Layout
from graphopt.backends.x86.isa import ISAS
from tests.backends.cpu.conv_harness import (
    REQUANTIZE,
    RESIDUAL_ADD,
    Data,
    conv_workload,
    random_data,
    reference,
)
from tests.backends.cpu.stream_harness import ROWS, run

SPARSE_ROWS = [row for row in ROWS if row.lanes >= 8]
NO_PADDING: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
RESIDUAL = Epilogue(requantize=REQUANTIZE, residual_add=RESIDUAL_ADD)

SHAPES: dict[str, Conv2d] = {
    "1x1": conv_workload((64, 24), (8, 12), **NO_PADDING),
    "1x1 of 49 pixels": conv_workload((64, 32), (7, 7), **NO_PADDING),
    "1x1, channels in no fours, batch of 3": conv_workload((5, 7), (9, 11), batch=3, **NO_PADDING),
    "1x1 stride 2": conv_workload((16, 24), (13, 17), stride=(2, 2), **NO_PADDING),
    "1x1 with a residual": conv_workload((64, 32), (14, 14), epilogue=RESIDUAL, **NO_PADDING),
    "3x3, two lines a vector": conv_workload((16, 24), (7, 7)),
    "3x3 of one channel": conv_workload((1, 6), (14, 14)),
    "3x3 of three channels": conv_workload((3, 10), (56, 56)),
    "3x3, lines of two vectors": conv_workload((8, 20), (28, 28)),
    "3x3, tiles across a line": conv_workload((4, 8), (9, 140)),
    "3x3 stride 2": conv_workload((16, 24), (15, 15), stride=(2, 2)),
    "3x3 stride 2, even": conv_workload((8, 12), (14, 14), stride=(2, 2)),
    "3x3 with a residual": conv_workload((16, 30), (10, 10), epilogue=RESIDUAL),
    "3x3, two lines a vector, with a residual": conv_workload((8, 12), (7, 7), epilogue=RESIDUAL),
    "1x1 stride 2, four lines a vector, with a residual": conv_workload(
        (8, 12), (14, 7), stride=(2, 2), epilogue=RESIDUAL, **NO_PADDING
    ),
    "3x3 dilated": conv_workload((16, 24), (12, 13), padding=(2, 2), dilation=(2, 2)),
    "7x7 stride 3": conv_workload((4, 8), (20, 23), (7, 7), padding=(3, 3), stride=(3, 3)),
    "5x3, padded down alone": conv_workload((8, 12), (11, 18), (5, 3), padding=(2, 0)),
    "map narrower than the window": conv_workload((4, 8), (6, 2), (3, 5), padding=(1, 2)),
    "dequantized": conv_workload((12, 33), (6, 9), epilogue=Epilogue()),
}

FLOATS = (
    "1x1, channels in no fours, batch of 3",
    "1x1 with a residual",
    "3x3, two lines a vector, with a residual",
    "3x3 of three channels",
    "3x3 stride 2",
    "7x7 stride 3",
)


def to_planar(layout: Layout, logical: np.ndarray) -> np.ndarray:
    """The planar tensor of ``[N, C, H, W]``; what the tensor does not reach holds noise."""
    batch, channels = logical.shape[:2]
    shape = (batch, layout.planes * layout.group, layout.plane_pixels)
    whole = np.random.default_rng(5).integers(0, 256, shape).astype(layout.dtype)
    whole[:, :channels, : layout.height * layout.width] = logical.reshape(batch, channels, -1)
    split = whole.reshape(batch, layout.planes, layout.group, layout.plane_pixels)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2))


def from_planar(layout: Layout, planes: np.ndarray) -> np.ndarray:
    """``[N, C, H, W]`` of a planar tensor."""
    whole = planes.transpose(0, 1, 3, 2).reshape(planes.shape[0], -1, layout.plane_pixels)
    pixels = layout.height * layout.width
    shape = (planes.shape[0], layout.channels, layout.height, layout.width)
    return np.ascontiguousarray(whole[:, : layout.channels, :pixels]).reshape(shape)


def masked(data: Data, zeros: float, seed: int = 3) -> Data:
    """The data with ``zeros`` of the weight's blocks zero: 4 bytes of neighbouring input channels, or a float."""
    group = 4 if data.weight.dtype == np.int8 else 1
    out_channels, in_channels, kh, kw = data.weight.shape
    shape = (out_channels, -(-in_channels // group), kh, kw)
    kept = np.random.default_rng(seed).random(shape) >= zeros
    mask = np.repeat(kept, group, axis=1)[:, :in_channels]
    return dataclasses.replace(data, weight=(data.weight * mask).astype(data.weight.dtype))


def run_sparse(
    workload: Conv2d,
    row: Isa,
    data: Data,
    threads: int = 1,
    choice: SparseChoice | None = None,
) -> np.ndarray:
    """The logical output of the sparse kernel for an NHWC workload."""
    wanted = as_planar(workload)
    multiplier = data.multiplier if workload.x.dtype == "uint8" else None
    if multiplier is not None:
        wanted = rounds_in_range(wanted, data.weight, data.bias, multiplier)
    plan = plan_sparse(wanted, row, choice)
    packed = pack_sparse(plan, data.weight, data.bias, multiplier, row.flips)
    arrays = [to_planar(wanted.x, data.x), *packed]
    if wanted.residual is not None:
        arrays.append(to_planar(wanted.residual, data.residual))
    out = np.zeros((data.x.shape[0], *wanted.y.shape), wanted.y.dtype)
    return from_planar(wanted.y, run(sparse(wanted, row, threads, choice), row, *arrays, out=out))


def as_float(workload: Conv2d) -> Conv2d:
    """The same shape in float32."""
    layouts = {
        name: dataclasses.replace(layout, dtype="float32", fill=0)
        for name in ("x", "y", "residual")
        if (layout := getattr(workload, name)) is not None
    }
    epilogue = Epilogue(float_residual=workload.residual is not None)
    return dataclasses.replace(workload, **layouts, x_zero_point=0, epilogue=epilogue)


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", SHAPES)
def test_integers_equal_the_definition(row: Isa, name: str) -> None:
    workload = SHAPES[name]
    data = masked(random_data(workload), 0.7)
    expected = reference(workload, data).astype(workload.y.dtype)
    np.testing.assert_array_equal(run_sparse(workload, row, data), expected)


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_close(row: Isa, name: str) -> None:
    workload = as_float(SHAPES[name])
    data = masked(random_data(workload), 0.8)
    # the rounding of a sum of some hundred products of unit variance
    np.testing.assert_allclose(
        run_sparse(workload, row, data), reference(workload, data), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("zeros", [0.0, 1.0])
def test_weights_without_zeros_and_of_zeros_alone(zeros: float) -> None:
    workload = SHAPES["3x3 stride 2"]
    data = masked(random_data(workload), zeros)
    expected = reference(workload, data).astype(np.uint8)
    np.testing.assert_array_equal(run_sparse(workload, SPARSE_ROWS[0], data), expected)


def test_rows_of_zeros_beside_rows_of_one_block() -> None:
    workload = SHAPES["1x1"]
    data = masked(random_data(workload), 1.0)
    data.weight[3, 8:12] = data.weight[17, 60:64] = [[[127]], [[-128]], [[1]], [[0]]]
    expected = reference(workload, data).astype(np.uint8)
    np.testing.assert_array_equal(run_sparse(workload, SPARSE_ROWS[0], data), expected)


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
def test_nothing_saturates(row: Isa) -> None:
    """255 * 127 * 2 leaves int16, where AVX2's byte products would stop."""
    workload = SHAPES["1x1"]
    data = random_data(workload)
    data.weight[:] = 127
    data.weight[:, ::8] = 0
    data.x[:] = 255
    data = dataclasses.replace(data, multiplier=np.full(24, 1.1e-4, np.float32))
    expected = reference(workload, data).astype(np.uint8)
    assert 0 < expected.min() < 255
    np.testing.assert_array_equal(run_sparse(workload, row, data), expected)


@pytest.mark.parametrize("epilogue", [Epilogue(requantize=REQUANTIZE), RESIDUAL])
def test_products_that_leave_int32_are_clamped_before_they_are_rounded(epilogue: Epilogue) -> None:
    workload = conv_workload((64, 24), (8, 12), epilogue=epilogue, **NO_PADDING)
    data = masked(random_data(workload), 0.5)
    data = dataclasses.replace(data, multiplier=np.full(24, 1e6, np.float32))
    wanted = rounds_in_range(as_planar(workload), data.weight, data.bias, data.multiplier)
    assert wanted.epilogue.requantize is not None
    assert not wanted.epilogue.requantize.fits
    expected = reference(workload, data).astype(np.uint8)
    np.testing.assert_array_equal(run_sparse(workload, SPARSE_ROWS[0], data), expected)


@pytest.mark.parametrize("name", ["1x1", "3x3, lines of two vectors", "3x3, two lines a vector"])
def test_threads_make_the_same_bytes(name: str) -> None:
    workload = SHAPES[name]
    data = masked(random_data(workload), 0.7)
    expected = reference(workload, data).astype(np.uint8)
    np.testing.assert_array_equal(run_sparse(workload, SPARSE_ROWS[0], data, threads=2), expected)


@pytest.mark.parametrize(
    "choice",
    [
        SparseChoice(1, 2),
        SparseChoice(3, 2),
        SparseChoice(2, 1, 4),
        SparseChoice(7, 1, 4),
        SparseChoice(1, 2, 1, 2),
        SparseChoice(1, 2, 2, 4),
    ],
)
def test_every_cut_makes_the_same_bytes(choice: SparseChoice) -> None:
    workload = conv_workload((14, 10), (28, 32), x_channel_stride=16)
    data = masked(random_data(workload), 0.7)
    expected = reference(workload, data).astype(np.uint8)
    actual = run_sparse(workload, ISAS["avx512-vnni"], data, choice=choice)
    np.testing.assert_array_equal(actual, expected)


def test_activations_of_floats() -> None:
    workload = as_float(SHAPES["1x1"])
    epilogue = Epilogue(activation=Activation("clamp", -0.5, 1.5))
    workload = dataclasses.replace(workload, epilogue=epilogue)
    data = masked(random_data(workload), 0.8)
    expected = reference(workload, data).clip(-0.5, 1.5)
    actual = run_sparse(workload, SPARSE_ROWS[0], data)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_stored_weights_take_the_space_of_their_blocks() -> None:
    workload = conv_workload((256, 256), (14, 14))
    data = masked(random_data(workload), 0.9)
    plan = plan_sparse(as_planar(workload), ISAS["avx512-vnni"])
    values, _, _, taps, starts = pack_sparse(plan, data.weight, data.bias, data.multiplier)
    count = round(density(data.weight) * data.weight.size / 4)
    assert (values.nbytes, taps.nbytes) == (4 * count, 2 * (count + AHEAD))
    assert starts.size == plan.parts * 256 + 1
    assert values.nbytes + taps.nbytes + starts.nbytes < 0.16 * data.weight.nbytes


def test_layers_of_one_shape_share_code() -> None:
    workload = as_planar(SHAPES["1x1"])
    assert function_name(workload, ISAS["avx2"], 1, None).startswith("sparse_u8s8_1x1_8x12x64_24_")


@pytest.mark.parametrize(
    ("workload", "row", "reason"),
    [
        (SHAPES["1x1"], "sse4", "sse4 has no sparse kernels"),
        (conv_workload((8, 8), groups=2), "avx2", "it is grouped"),
        (
            conv_workload((8, 8), (1, 2), **NO_PADDING),
            "avx2",
            "a vector holds more pixels than the map has",
        ),
        (
            conv_workload((1024, 8), (224, 224), **NO_PADDING),
            "avx2",
            "its input is too large for 16-bit offsets",
        ),
    ],
)
def test_declines(workload: Conv2d, row: str, reason: str) -> None:
    assert fits(as_planar(workload), ISAS[row]) == reason


def test_weights_without_zero_blocks_are_not_compared() -> None:
    workload = SHAPES["1x1"]
    assert compare(workload, np.ones((24, 64, 1, 1), np.int8), ISAS["avx2"], 1) is None


def test_few_zeros_stay_dense() -> None:
    weight = masked(random_data(SHAPES["1x1"]), 0.2).weight
    forms = compare(SHAPES["1x1"], weight, ISAS["avx512-vnni"], 1)
    assert forms is not None
    assert (forms.sparse, forms.reason) == (None, "too few blocks are zero")


def test_the_estimate_falls_with_the_blocks() -> None:
    workload = conv_workload((256, 256), (14, 14))
    estimates = []
    for zeros in (0.5, 0.8, 0.95):
        forms = compare(
            workload, masked(random_data(workload), zeros).weight, ISAS["avx512-vnni"], 1
        )
        assert forms is not None
        assert forms.sparse is not None
        estimates.append(forms.sparse / forms.dense)
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] > 0.8
    assert estimates[-1] < 0.4
