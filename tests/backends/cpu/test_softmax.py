"""Softmax of rows against float64, and what IEEE 754's special values become."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.softmax import softmax
from graphopt.backends.cpu.tokens import Softmax
from graphopt.errors import CompileError
from tests.backends.cpu.matrix_harness import assert_near, noise, physical, rows
from tests.backends.cpu.stream_harness import ROWS, run


def compute(x: np.ndarray, row=ROWS[0], threads: int = 1, dynamic: bool = False) -> np.ndarray:
    layout = rows(x, dynamic)
    kernel = softmax(Softmax(layout, layout), row, threads)
    return run(kernel, row, physical(x), out=physical(x)).reshape(x.shape)


def exact(x: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(x).double(), -1).numpy()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("channels", [1, 3, 16, 29, 64, 197, 1000])
def test_rows(channels, row):
    x = 10 * noise(0, 2, 5, channels)
    assert_near(compute(x, row), exact(x), 1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_threads_and_a_dynamic_batch(dynamic):
    x = noise(0, 3, 4, 21)
    assert_near(compute(x, ROWS[0], 2, dynamic), exact(x), 1e-6)


@pytest.mark.parametrize("channels", [3, 16, 45])
def test_large_values_do_not_overflow(channels):
    x = noise(0, 2, channels) * 1e4 + 1e5
    assert_near(compute(x), exact(x), 1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("channels", [3, 16, 45])
def test_special_values(channels, row):
    """Masked elements are exactly 0; a row all masked, or one that holds NaN or inf, is NaN."""
    x = noise(0, 6, channels)
    x[1, 1:] = -np.inf
    x[2] = -np.inf
    x[3, channels - 1] = np.nan
    x[4, 0] = np.inf
    x[5, 0] = -np.inf
    actual = compute(x, row)
    assert_near(actual, exact(x), 1e-6)
    assert actual[1].tolist() == [1.0] + [0.0] * (channels - 1)
    assert np.isnan(actual[2:5]).all()
    assert actual[5, 0] == 0.0


def test_layouts_that_differ():
    layout = rows(noise(0, 2, 3))
    other = dataclasses.replace(layout, right=1)
    with pytest.raises(CompileError, match="softmax takes dense rows of one layout"):
        softmax(Softmax(layout, other), ROWS[0], 1)


def test_a_wrong_maximum_shows():
    """What the comparison is worth: logits off by 1e-3 fail it."""
    x = noise(0, 4, 21)
    shifted = x + np.where(np.arange(21) < 10, 0, 1e-3).astype(np.float32)
    with pytest.raises(AssertionError):
        assert_near(compute(shifted), exact(x), 1e-6)
