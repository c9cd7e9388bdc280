"""Layer norm of rows against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphopt.backends.cpu.layer_norm import layer_norm, pack_layer_norm
from graphopt.backends.cpu.tokens import LayerNorm
from graphopt.errors import CompileError
from tests.backends.cpu.matrix_harness import assert_near, noise, physical, rows
from tests.backends.cpu.stream_harness import ROWS, run

EPSILON = 1e-5


def compute(x, weight=None, bias=None, row=ROWS[0], threads=1, dynamic=False, epsilon=EPSILON):
    layout = rows(x, dynamic)
    workload = LayerNorm(layout, layout, epsilon)
    packed = pack_layer_norm(workload, weight, bias)
    kernel = layer_norm(workload, row, threads)
    return run(kernel, row, physical(x), *packed, out=physical(x)).reshape(x.shape)


def exact(x, weight=1.0, bias=0.0):
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * weight + bias


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("channels", [1, 3, 16, 29, 64, 197, 384])
def test_rows(channels, row):
    x, weight, bias = noise(0, 2, 5, channels), noise(1, channels), noise(2, channels)
    assert_near(compute(x, weight, bias, row), exact(x, weight, bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_threads_and_a_dynamic_batch(dynamic):
    x = noise(0, 3, 4, 21)
    assert_near(compute(x, threads=2, dynamic=dynamic), exact(x))


def test_a_large_mean_costs_little():
    """Two passes: the variance of x + 100 is off by the rounding of x itself, not by 100**2."""
    x = noise(0, 3, 197) + np.float32(100)
    assert_near(compute(x), exact(x), 1e-4)


def test_a_constant_row_is_the_bias():
    x, bias = np.full((2, 24), 3.0, np.float32), noise(1, 24)
    np.testing.assert_array_equal(compute(x, None, bias), np.stack([bias, bias]))


def test_layouts_that_differ():
    layout = rows(noise(0, 2, 3))
    other = dataclasses.replace(layout, right=1)
    with pytest.raises(CompileError, match="layer_norm takes dense rows of one layout"):
        layer_norm(LayerNorm(layout, other, EPSILON), ROWS[0], 1)


def test_a_wrong_epsilon_shows():
    """What the comparison is worth: epsilon 1e-3 for 1e-5 fails it."""
    x = noise(0, 4, 21)
    with pytest.raises(AssertionError):
        assert_near(compute(x, epsilon=1e-3), exact(x))
