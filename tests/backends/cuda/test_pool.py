"""Pooling, run by the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.pool import pack_pool2d
from graphopt.backends.cpu.workload import Pool2d, Requantize
from graphopt.backends.cuda.pool import pool
from tests.backends.cuda.harness import Array, image, logical, stored, to_torch
from tests.backends.cuda.simt import run

RNG = np.random.default_rng(1)
X = image(2, (7, 8), 10)
VALUES = RNG.integers(0, 256, (2, 7, 8, 10)).astype(np.uint8)
MULTIPLIER = 0.37


def _result(workload: Pool2d, memory: Array) -> Array:
    y = np.zeros((2, *workload.y.shape), workload.y.dtype)
    run(pool(workload), memory, *pack_pool2d(workload, MULTIPLIER), y)
    return logical(workload.y, y)


def _nhwc(value: Any) -> Array:
    found: Array = value.numpy().transpose(0, 2, 3, 1)
    return found


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    ("stride", "dilation", "ceil"), [(2, 1, False), (1, 2, False), (2, 1, True)]
)
def test_maximum(stride: int, dilation: int, ceil: bool, dtype: str) -> None:
    shape = ([3, 3], [stride] * 2, [1, 1], [dilation] * 2, ceil)
    values, x = VALUES.view(dtype), image(2, (7, 8), 10, dtype)
    want = _nhwc(torch.ops.graphopt.max_pool2d(to_torch(values), *shape))
    y = image(2, want.shape[1:3], 10, dtype)
    workload = Pool2d("max", x, y, (3, 3), (stride, stride), (1, 1), (dilation, dilation))
    assert (_result(workload, stored(x, 2, values, RNG)) == want).all()


def test_integer_average_of_signed_bytes() -> None:
    values, x = VALUES.view(np.int8), image(2, (7, 8), 10, "int8")
    shape = ([3, 3], [2, 2], [1, 1], False, True, 0)
    want = torch.ops.graphopt.avg_pool2d(to_torch(values), *shape, 1.9, -50, 9, -128, 127)
    workload = Pool2d(
        "average",
        x,
        image(2, (4, 4), 10, "int8"),
        (3, 3),
        (2, 2),
        (1, 1),
        count_include_pad=True,
        x_zero_point=-50,
        requantize=Requantize(9, -128, 127),
    )
    y = np.zeros((2, *workload.y.shape), np.int8)
    run(pool(workload), stored(x, 2, values, RNG), *pack_pool2d(workload, 1.9), y)
    assert (logical(workload.y, y) == _nhwc(want)).all()


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("divisor", [0, 7])
def test_integer_average(include: bool, ceil: bool, divisor: int) -> None:
    shape = ([3, 3], [2, 2], [1, 1], ceil, include, divisor)
    want = _nhwc(torch.ops.graphopt.avg_pool2d(to_torch(VALUES), *shape, MULTIPLIER, 5, 9, 0, 255))
    workload = Pool2d(
        "average",
        X,
        image(2, want.shape[1:3], 10),
        (3, 3),
        (2, 2),
        (1, 1),
        count_include_pad=include,
        divisor_override=divisor,
        x_zero_point=5,
        requantize=Requantize(9, 0, 255),
    )
    assert (_result(workload, stored(X, 2, VALUES, RNG)) == want).all()


def test_the_whole_map_to_floats() -> None:
    want = torch.ops.graphopt.global_avg_pool_dequantize(to_torch(VALUES), MULTIPLIER, 5, True)
    y = image(2, (1, 1), 10, "float32")
    workload = Pool2d("average", X, y, (7, 8), (7, 8), x_zero_point=5)
    assert (_result(workload, stored(X, 2, VALUES, RNG)) == _nhwc(want)).all()


def test_floats_and_their_nans() -> None:
    x, y = image(2, (7, 8), 10, "float32"), image(2, (3, 3), 10, "float32")
    values = RNG.standard_normal((2, 7, 8, 10)).astype(np.float32)
    values[0, 1, 1, 3] = np.nan
    maximum = _result(Pool2d("max", x, y, (3, 3), (2, 2)), values.copy())
    want = _nhwc(torch.nn.functional.max_pool2d(to_torch(values), 3, 2))
    np.testing.assert_array_equal(maximum, want)
    average = _result(Pool2d("average", x, y, (3, 3), (2, 2)), values.copy())
    want = _nhwc(torch.nn.functional.avg_pool2d(to_torch(values), 3, 2))
    np.testing.assert_allclose(
        average, want, rtol=0, atol=1e-6
    )  # 9 sums of about 1, in another order
