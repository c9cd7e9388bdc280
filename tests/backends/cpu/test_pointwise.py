"""add and mul: integer sums bit for bit, float results against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.backends.cpu.pointwise import add, mul
from graphopt.backends.cpu.workload import Activation, Add, Layout, Mul, QuantizedAdd
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, round_and_clamp, run

PARAMETERS = QuantizedAdd(2**21 - 1, -1234567, 21, 17, 200, 128, 0, 255)


def reference_add(workload: Add, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    p = workload.add
    if p is None:
        return np.asarray(np.maximum(a + b, 0) if workload.activation else a + b)
    v = (a.astype(np.int64) - p.a_zero_point) * p.a_multiplier
    v += (b.astype(np.int64) - p.b_zero_point) * p.b_multiplier
    assert np.abs(v).max() < 2**31
    scaled = v.astype(np.int32).astype(np.float32) * np.float32(2.0**-p.shift)
    return round_and_clamp(scaled, p).astype(workload.y.dtype)


def check_add(workload: Add, row, threads: int = 1, batch: int = 1) -> None:
    a, b = (random_map(layout, i, batch) for i, layout in enumerate((workload.a, workload.b)))
    expected = pack(workload.y, reference_add(workload, a, b))
    arrays = pack(workload.a, a), pack(workload.b, b)
    actual = run(add(workload, row, threads), row, *arrays, out=expected)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("channels", [1, 3, 24])
def test_adds_into_margins(row, channels):
    a = Layout(2, 5, 6, channels, "uint8")
    b = Layout(2, 5, 6, channels, "uint8", 1, 2, 0, 3, fill=5)
    y = Layout(2, 5, 6, channels, "uint8", 0, 1, 2, 1, channels + 5, fill=128)
    check_add(Add(a, b, y, PARAMETERS), row)
    check_add(Add(a, b, a, PARAMETERS), row)


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(-(2**21) + 1, 2**21 - 1),
    st.integers(-(2**21) + 1, 2**21 - 1),
    st.integers(8, 24),
    st.integers(0, 255),
    st.sampled_from(ROWS),
)
@settings(max_examples=25, deadline=None)
@example(1, 1, 1, 1, 2**20, 2**20, 21, 3, ROWS[-1])  # ties: half to even
def test_random_additions(batch, height, width, channels, left, right, shift, zero_point, row):
    layout = Layout(batch, height, width, channels, "uint8")
    parameters = QuantizedAdd(left, right, shift, zero_point, 77, zero_point, 3, 250)
    check_add(Add(layout, layout, layout, parameters), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_float_add_and_mul(row):
    layout = Layout(2, 3, 5, 19, "float32", right=1)
    check_add(Add(layout, layout, layout), row)
    check_add(Add(layout, layout, layout, activation=Activation("relu")), row)
    a, b = random_map(layout, 1), random_map(layout, 2)
    expected = pack(layout, a * b)
    kernel = mul(Mul(layout, layout, layout), row, 1)
    actual = run(kernel, row, pack(layout, a), pack(layout, b), out=expected)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("width", [1, 4])
def test_mul_repeats_a_vector_of_channels(row, width):
    layout, scales = Layout(3, 4, width, 19, "float32"), Layout(3, 1, 1, 19, "float32")
    a, b = random_map(layout, 1), random_map(scales, 2)
    expected = pack(layout, a * b)
    kernel = mul(Mul(layout, scales, layout), row, 1)
    actual = run(kernel, row, pack(layout, a), pack(scales, b), out=expected)
    np.testing.assert_array_equal(actual, expected)


def test_dynamic_batch_and_threads():
    layout = Layout(None, 5, 6, 24, "uint8", right=1, fill=128)
    for threads in (1, 2):
        check_add(Add(layout, layout, layout, PARAMETERS), ROWS[0], threads, batch=3)
    assert "T.parallel" in add(Add(layout, layout, layout, PARAMETERS), ROWS[0], 2).script()


def test_declines_unequal_shapes():
    a, b = Layout(1, 2, 2, 4, "float32"), Layout(1, 2, 2, 5, "float32")
    with pytest.raises(CompileError, match="add takes tensors of one shape"):
        add(Add(a, b, a), ROWS[0], 1)
    with pytest.raises(CompileError, match="mul takes b of shape"):
        mul(Mul(a, b, a), ROWS[0], 1)
