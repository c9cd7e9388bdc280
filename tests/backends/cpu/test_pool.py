"""pool2d: against torch where torch defines the answer, against the integer definition in NumPy elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import graphopt.integer  # noqa: F401 - defines torch.ops.graphopt
from graphopt.backends.cpu.pool import pack_pool2d, pool2d
from graphopt.backends.cpu.workload import Layout, Pool2d, Requantize
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, round_and_clamp, run

ROUNDING = Requantize(zero_point=9, qmin=0, qmax=255)
MULTIPLIER = 1.37


def outputs(extent, kernel, stride, padding, dilation, ceil_mode):
    reach = extent + 2 * padding - dilation * (kernel - 1) - 1
    count = (math.ceil(reach / stride) if ceil_mode else reach // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= extent + padding else count


def make(
    kind, shape, dtype, kernel, stride, padding, dilation=(1, 1), ceil_mode=False, to=None, **fields
):
    """``to`` is y's dtype where it is not x's: an integer average read as floats."""
    batch, channels, height, width = shape
    rows, columns = (
        outputs(shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    )
    x = Layout(batch, height, width, channels, dtype, 1, 0, 2, 1, channels + 3, fill=100)
    y = Layout(batch, rows, columns, channels, to or dtype, 1, 2, 0, 1, channels + 1, fill=9)
    rounding = ROUNDING if kind == "average" and y.dtype != "float32" else None
    return Pool2d(
        kind, x, y, kernel, stride, padding, dilation, requantize=rounding, **fields
    ), ceil_mode


def reference(workload: Pool2d, logical: np.ndarray, ceil_mode: bool) -> np.ndarray:
    kernel, stride, padding = workload.kernel, workload.stride, workload.padding
    x = torch.from_numpy(logical)
    if workload.kind == "max":
        y = torch.nn.functional.max_pool2d(
            x.double(), kernel, stride, padding, workload.dilation, ceil_mode
        )
        if logical.dtype == np.float32:
            return y.numpy().astype(np.float32)
        # A dilated window may miss the map altogether: the lowest value, as in torch's integer kernels.
        lowest = np.iinfo(logical.dtype).min
        return np.asarray(np.maximum(y.numpy(), lowest), dtype=logical.dtype)
    average = lambda t, **kw: torch.nn.functional.avg_pool2d(  # noqa: E731
        t, kernel, stride, padding, ceil_mode, **kw
    )
    if logical.dtype == np.float32:
        override = workload.divisor_override or None
        include = workload.count_include_pad
        return average(x.double(), count_include_pad=include, divisor_override=override).numpy()
    centred = x.double() - workload.x_zero_point
    total = average(centred, divisor_override=1).numpy().astype(np.float32)
    ones = torch.ones_like(centred)
    count = average(ones, divisor_override=1).numpy()  # the real elements
    if workload.count_include_pad:
        count = count / average(ones, count_include_pad=True).numpy()
    if workload.divisor_override:
        count = np.full_like(count, workload.divisor_override)
    scaled = total * (np.float64(MULTIPLIER) / np.rint(count)).astype(np.float32)
    if workload.requantize is None:
        return np.asarray(scaled)
    return round_and_clamp(scaled, workload.requantize).astype(logical.dtype)


def check(case, row, threads: int = 1) -> None:
    workload, ceil_mode = case
    logical = random_map(workload.x, seed=1)
    expected = pack(workload.y, reference(workload, logical, ceil_mode))
    table = pack_pool2d(workload, MULTIPLIER)
    x = pack(workload.x, logical)
    actual = run(pool2d(workload, row, threads), row, x, *table, out=expected)
    if workload.kind == "average" and workload.x.dtype == "float32":
        # A sum of at most 81 terms of one magnitude in float32 against float64.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-3)
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_three_by_three_stride_two(row, kind, dtype):
    check(make(kind, (1, 24, 11, 12), dtype, (3, 3), (2, 2), (1, 1), ceil_mode=True), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32"])
def test_global_average(row, dtype):
    check(make("average", (2, 40, 7, 7), dtype, (7, 7), (1, 1), (0, 0), x_zero_point=31), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("to", ["uint8", "float32"])
def test_an_average_over_more_than_256_elements_is_exact(row, to):
    check(make("average", (1, 3, 20, 20), "uint8", (20, 20), (1, 1), (0, 0), to=to), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("size", [(1, 1), (4, 3), (13, 13), (16, 17)])
@pytest.mark.parametrize("channels", [1, 37])
def test_a_global_average_of_bytes_in_float(row, dtype, size, channels):
    shape = (2, channels, *size)
    case = make("average", shape, dtype, size, size, (0, 0), to="float32", x_zero_point=31)
    check(case, row)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_a_float_average_of_saturated_bytes(zero_point):
    """The compiled sums equal the operator's: 16-bit sums hold 256 elements of 255."""
    generator = torch.Generator().manual_seed(0)
    for size in ((16, 16), (1, 257), (40, 41)):
        x = Layout(1, *size, 6, "uint8", channel_stride=8)
        y = Layout(1, 1, 1, 6, "float32")
        q = torch.randint(250, 256, (1, 6, *size), generator=generator).to(torch.uint8)
        q[:, 0] = 255
        workload = Pool2d("average", x, y, size, size, x_zero_point=zero_point)
        table = pack_pool2d(workload, 0.0173)
        actual = run(
            pool2d(workload, ROWS[0], 1),
            ROWS[0],
            pack(x, q.numpy()),
            *table,
            out=np.zeros((1, 1, 1, 6), np.float32),
        )
        defined = torch.ops.graphopt.global_avg_pool_dequantize(q, 0.0173, zero_point, False)
        np.testing.assert_array_equal(actual.reshape(1, 6), defined.numpy())


@given(
    st.sampled_from(["max", "average"]),
    st.sampled_from(["uint8", "int8", "float32"]),
    st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 0, 5]),
    st.booleans(),
    st.sampled_from(ROWS),
)
@settings(max_examples=40, deadline=None)
@example("average", "uint8", (3, 1, 7, 7), (3, 3), (2, 2), (1, 1), 1, True, True, 0, False, ROWS[0])
@example(
    "average", "uint8", (1, 3, 6, 6), (3, 3), (2, 2), (1, 1), 1, True, False, 0, False, ROWS[-1]
)
@example(
    "average", "uint8", (1, 3, 6, 6), (3, 2), (3, 2), (1, 0), 1, True, True, 7, False, ROWS[-1]
)
@example("average", "uint8", (1, 3, 6, 6), (3, 2), (2, 2), (1, 1), 1, True, False, 0, True, ROWS[0])
@example("max", "uint8", (1, 1, 1, 1), (2, 1), (1, 1), (1, 0), 2, False, False, 0, False, ROWS[0])
@example("max", "int8", (1, 3, 13, 13), (9, 9), (1, 1), (4, 4), 1, False, True, 0, False, ROWS[1])
def test_random_windows(
    kind, dtype, shape, kernel, stride, padding, dilation, ceil_mode, include, override, real, row
):
    assume(all(padding[i] <= kernel[i] // 2 for i in (0, 1)))
    steps = (dilation, dilation) if kind == "max" else (1, 1)
    sizes = [
        outputs(shape[2 + i], kernel[i], stride[i], padding[i], steps[i], ceil_mode) for i in (0, 1)
    ]
    assume(min(sizes) > 0)
    fields = {"count_include_pad": include, "divisor_override": override, "x_zero_point": 31}
    fields["to"] = "float32" if real and kind == "average" else dtype
    check(make(kind, shape, dtype, kernel, stride, padding, steps, ceil_mode, **fields), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_nan_wins_a_float_maximum(row):
    workload, _ = make("max", (1, 5, 4, 4), "float32", (2, 2), (2, 2), (0, 0))
    logical = random_map(workload.x, seed=1)
    logical[0, :, 0, 1] = np.nan
    logical[0, :, 3, 3] = -np.inf
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(logical), 2).numpy()
    physical = pack(workload.y, expected)
    actual = run(pool2d(workload, row, 1), row, pack(workload.x, logical), out=physical)
    np.testing.assert_array_equal(actual, physical)


def test_threads_split_the_rows():
    case = make("max", (2, 24, 11, 12), "uint8", (3, 3), (2, 2), (1, 1))
    check(case, ROWS[0], threads=2)
    assert "T.parallel" in pool2d(case[0], ROWS[0], 2).script()


def test_declines_what_it_cannot_round():
    workload, _ = make("average", (1, 3, 4, 4), "float32", (2, 2), (2, 2), (0, 0), (2, 2))
    with pytest.raises(CompileError, match="no dilation"):
        pool2d(workload, ROWS[0], 1)
    integer = Pool2d("average", workload.x, workload.y, (2, 2), (2, 2))
    bare = Layout(1, 4, 4, 3, "uint8")
    with pytest.raises(CompileError, match="must round"):
        pool2d(Pool2d("average", bare, bare, (2, 2), (2, 2)), ROWS[0], 1)
    real = Layout(1, 2, 2, 3, "float32")
    with pytest.raises(CompileError, match="is not rounded"):
        pool2d(Pool2d("average", bare, real, (2, 2), (2, 2), requantize=ROUNDING), ROWS[0], 1)
    assert pack_pool2d(integer, 1.0) == []
