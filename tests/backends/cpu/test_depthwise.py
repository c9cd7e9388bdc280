"""depthwise: integers bit for bit against the definition on every row, floats against a float64 convolution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.backends.cpu.depthwise import depthwise, pack_depthwise
from graphopt.backends.cpu.workload import (
    Activation,
    Conv2d,
    Epilogue,
    Layout,
    QuantizedAdd,
    Requantize,
)
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, round_and_clamp, run

ZERO_POINT = 31
ROUNDING = Requantize(zero_point=9, qmin=5, qmax=250)
RESIDUAL = QuantizedAdd(2**20 + 12345, -(2**20) + 99, 20, 9, 77, 100, 0, 255)


def make(dtype, shape, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), **fields):
    """A workload whose margins hold exactly what the windows touch, plus pad channels and margins of the output."""
    batch, channels, height, width = shape
    integer = dtype == "uint8"
    x = Layout(
        batch, height, width, channels, dtype, padding[0], padding[0], padding[1], padding[1]
    )
    x = replace(x, fill=ZERO_POINT if integer else 0)
    rows, columns = (
        (shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    epilogue = fields.pop("epilogue", Epilogue(ROUNDING) if integer else Epilogue())
    out = "uint8" if epilogue.requantize else "float32"
    y = Layout(batch, rows, columns, channels, out, 1, 0, 2, 1, channels + 3, fill=9)
    residual = None
    if epilogue.residual_add or epilogue.float_residual:
        residual = Layout(batch, rows, columns, channels, out, 0, 1, 1, 0)
    zero_point = ZERO_POINT if integer else 0
    return Conv2d(x, y, kernel, stride, padding, dilation, channels, zero_point, epilogue, residual)


def convolve(workload: Conv2d, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The accumulators, bias included: exact for integers, float64 for floats."""
    y = torch.nn.functional.conv2d(
        torch.from_numpy(x).double() - workload.x_zero_point,
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        workload.stride,
        workload.padding,
        workload.dilation,
        workload.groups,
    )
    return np.asarray(y.numpy())


def reference(workload, x, weight, bias, multiplier, residual) -> np.ndarray:
    sums, epilogue = convolve(workload, x, weight, bias), workload.epilogue
    if x.dtype == np.float32:
        if residual is not None:
            sums = sums + residual
        return np.asarray(np.clip(sums, 0, 6) if epilogue.activation else sums)
    scaled = sums.astype(np.int32).astype(np.float32) * multiplier[:, None, None]
    if epilogue.requantize is None:
        return np.asarray(np.clip(scaled, 0, 6) if epilogue.activation else scaled)
    q = round_and_clamp(scaled, epilogue.requantize)
    add = epilogue.residual_add
    if add is not None:
        v = (q - add.a_zero_point) * add.a_multiplier
        v = v + (residual.astype(np.int32) - add.b_zero_point) * add.b_multiplier
        q = round_and_clamp(v.astype(np.float32) * np.float32(2.0**-add.shift), add)
    return q.astype(np.uint8)


def check(workload: Conv2d, row, threads: int = 1, batch: int = 1) -> None:
    generator = np.random.default_rng(7)
    channels, shape = workload.x.channels, (workload.x.channels, 1, *workload.kernel)
    x = random_map(workload.x, 1, batch)
    integer = workload.x.dtype == "uint8"
    multiplier = None
    if integer:
        weight = generator.integers(-128, 128, shape).astype(np.int8)
        bias = generator.integers(-5000, 5000, channels).astype(np.int32)
        multiplier = (generator.uniform(0.2, 4, channels) / 512).astype(np.float32)
    else:
        weight = generator.standard_normal(shape).astype(np.float32)
        bias = generator.standard_normal(channels).astype(np.float32)
    residual = None if workload.residual is None else random_map(workload.residual, 2, batch)
    expected = pack(workload.y, reference(workload, x, weight, bias, multiplier, residual))
    arrays = [pack(workload.x, x), *pack_depthwise(workload, row, weight, bias, multiplier)]
    if workload.residual is not None and residual is not None:
        arrays.append(pack(workload.residual, residual))
    actual = run(depthwise(workload, row, threads), row, *arrays, out=expected)
    if integer:
        np.testing.assert_array_equal(actual, expected)
    else:
        # Sums of up to 81 products of about 100 in float32.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride"),
    [(24, 3, 1), (40, 5, 2), (3, 3, 2), (16, 7, 1), (96, 3, 2), (144, 3, 1), (72, 5, 1)],
)
def test_shapes_of_real_networks(row, dtype, channels, kernel, stride):
    padding = kernel // 2
    shape = (2, channels, 9, 11)
    check(make(dtype, shape, (kernel, kernel), (stride, stride), (padding, padding)), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize(
    ("dtype", "epilogue"),
    [
        ("uint8", Epilogue(ROUNDING, RESIDUAL)),
        ("uint8", Epilogue(activation=Activation("relu6"))),
        ("float32", Epilogue(float_residual=True, activation=Activation("relu6"))),
    ],
)
def test_epilogues(row, dtype, epilogue):
    check(make(dtype, (1, 40, 6, 7), (3, 3), (1, 1), (1, 1), epilogue=epilogue), row)


@given(
    st.sampled_from(["uint8", "uint8", "float32"]),
    st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 12), st.integers(1, 20)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.sampled_from(ROWS),
)
@settings(max_examples=20, deadline=None)
@example("uint8", (3, 33, 12, 20), (2, 5), (2, 3), (1, 2), (2, 1), ROWS[-1])
@example("uint8", (1, 17, 12, 12), (9, 9), (1, 1), (4, 4), (1, 1), ROWS[0])
@example("uint8", (1, 17, 12, 12), (12, 3), (1, 1), (4, 4), (1, 1), ROWS[2])
def test_random_shapes(dtype, shape, kernel, stride, padding, dilation, row):
    spans = [dilation[i] * (kernel[i] - 1) for i in (0, 1)]
    padding = tuple(
        max(padding[i], -(-(spans[i] + 1 - shape[2 + i]) // 2)) for i in (0, 1)
    )  # at least one window fits
    check(make(dtype, shape, kernel, stride, padding, dilation), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_extreme_operands_do_not_saturate(row):
    workload = make("uint8", (1, 32, 5, 8), (3, 3), epilogue=Epilogue())
    workload = replace(workload, x_zero_point=0)
    x = np.full((1, 32, 5, 8), 255, np.uint8)
    for value in (-128, 127):
        weight = np.full((32, 1, 3, 3), value, np.int8)
        one = np.ones(32, np.float32)
        packed = pack_depthwise(workload, row, weight, None, one)
        expected = pack(workload.y, np.full((1, 32, 3, 6), 9 * 255 * value, np.float32))
        arrays = pack(workload.x, x), *packed
        actual = run(depthwise(workload, row, 1), row, *arrays, out=expected)
        np.testing.assert_array_equal(actual, expected)


def test_dynamic_batch_and_threads():
    workload = make("uint8", (None, 24, 6, 7), (3, 3), (1, 1), (1, 1))
    for threads in (1, 2):
        check(workload, ROWS[0], threads, batch=3)
    assert "T.parallel" in depthwise(workload, ROWS[0], 2).script()
    assert "T.parallel" not in depthwise(workload, ROWS[0], 1).script()


def test_declines_a_channel_multiplier():
    workload = make("uint8", (1, 4, 6, 7), (3, 3))
    twice = replace(workload, y=replace(workload.y, channels=8, channel_stride=8))
    with pytest.raises(CompileError, match="one filter a channel"):
        depthwise(twice, ROWS[0], 1)


def test_the_zero_point_is_data_and_not_code():
    workload = make("uint8", (1, 4, 6, 7), (3, 3))
    other = replace(workload, x_zero_point=5, x=replace(workload.x, fill=5))
    names = {depthwise(w, ROWS[0], 1).attrs["global_symbol"] for w in (workload, other)}
    assert len(names) == 1
