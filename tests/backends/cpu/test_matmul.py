"""Products of activations against float64, operands in every order of their axes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphopt.backends.cpu.matmul import matmul, share_rows
from graphopt.backends.cpu.tokens import Matmul
from graphopt.errors import CompileError
from tests.backends.cpu.matrix_harness import assert_near, noise, physical, strided, viewed
from tests.backends.cpu.stream_harness import ROWS, run

HEADS = (0, 2, 1, 3)  # [batch, tokens, heads, channels], as a linear layer makes them
ORDERS = {"plain": HEADS, "transposed": (0, 2, 3, 1), "scattered": (0, 3, 2, 1)}
SHAPES = [(2, 3, 5, 1, 3), (1, 1, 1, 7, 1), (1, 2, 29, 5, 47), (2, 1, 197, 64, 33)]


def check(shape, row, order="plain", threads=1, dynamic=False):
    """``y[n, :, h] = 0.5 * a[n, :, h] @ b[n, h]``."""
    batch, heads, m, k, n = shape
    a, a_view = viewed(noise(1, batch, heads, m, k), HEADS)
    b, b_view = viewed(noise(2, batch, heads, k, n), ORDERS[order])
    exact, _ = viewed(0.5 * (a_view.astype(np.float64) @ b_view), HEADS)
    y = np.zeros(exact.shape, np.float32)
    views = [(a_view, a), (b_view, b), (y.transpose(HEADS), y)]
    left, right, target = (strided(view, base, dynamic) for view, base in views)
    lead = (None if dynamic else batch, heads)
    workload = Matmul(left, right, target, lead, m, k, n, 0.5)
    kernel = matmul(workload, row, threads)
    actual = run(kernel, row, physical(a), physical(b), out=physical(y))
    assert_near(actual, physical(exact))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape, order, row):
    check(shape, row, order)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_threads_and_a_dynamic_batch(threads, dynamic):
    for shape in SHAPES:
        check(shape, ROWS[0], "transposed", threads, dynamic)


def test_a_matrix_for_all():
    """b of two dimensions: strides of 0 along the leading axes."""
    a, b, y = noise(1, 3, 7, 5), noise(2, 5, 9), np.zeros((3, 7, 9), np.float32)
    repeated = strided(np.broadcast_to(b, (3, 5, 9)), b)
    workload = Matmul(strided(a, a), repeated, strided(y, y), (3,), 7, 5, 9)
    kernel = matmul(workload, ROWS[0], 1)
    actual = run(kernel, ROWS[0], physical(a), physical(b), out=physical(y))
    assert_near(actual, physical(a.astype(np.float64) @ b))


def test_a_wrong_scale_shows():
    """What the comparison is worth: an error of one part in 1,000 fails it."""
    a, b = noise(1, 4, 16), noise(2, 16, 8)
    y = np.zeros((4, 8), np.float32)
    workload = Matmul(strided(a, a), strided(b, b), strided(y, y), (), 4, 16, 8, 1.001)
    actual = run(matmul(workload, ROWS[0], 1), ROWS[0], physical(a), physical(b), out=physical(y))
    with pytest.raises(AssertionError):
        assert_near(actual, physical(a.astype(np.float64) @ b))


def test_columns_of_y_apart():
    a, b, y = noise(1, 4, 4), noise(2, 4, 4), np.zeros((4, 4), np.float32)
    workload = Matmul(strided(a, a), strided(b, b), strided(y, y), (), 4, 4, 4)
    workload = dataclasses.replace(workload, y=strided(y.T, y))
    with pytest.raises(CompileError, match="matmul writes columns side by side, not 4 apart"):
        matmul(workload, ROWS[0], 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("matrices", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 13, 14, 15, 197])
def test_shares_cover_the_rows(rows, matrices, threads):
    tasks = share_rows(rows, min(rows, 14), (matrices,), threads)
    assert (tasks.shares - 1) * tasks.chunk < tasks.tiles <= tasks.shares * tasks.chunk
    assert tasks.tiles * tasks.pixels >= rows
