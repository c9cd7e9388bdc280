"""Sums, products, pools, concatenation and casts of float16, run by the interpreter: computed in float32, rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from graphopt.backends.cpu.workload import (
    Activation,
    Add,
    Concat,
    Convert,
    Layout,
    Mul,
    Pool2d,
    Requantize,
)
from graphopt.backends.cuda.pointwise import add, concat, convert, mul
from graphopt.backends.cuda.pool import pool
from tests.backends.cuda.harness import Array, image, in_fours, logical, stored, to_torch
from tests.backends.cuda.simt import run

RNG = np.random.default_rng(11)


def _half(size: tuple[int, int], channels: int, batch: int | None = 2) -> Layout:
    return image(batch, size, channels, "float16", channel_stride=in_fours(channels))


def _values(layout: Layout) -> Array:
    shape = (2, layout.height, layout.width, layout.channels)
    return RNG.standard_normal(shape).astype(layout.dtype)


def _empty(layout: Layout) -> Array:
    return np.full((2, *layout.shape), np.nan, layout.dtype)


def _wide(values: Array) -> torch.Tensor:
    return to_torch(values.astype(np.float32))


@pytest.mark.parametrize("channels", [8, 6, 3])
@pytest.mark.parametrize("other_dtype", ["float16", "float32"])
def test_sums_and_products(channels: int, other_dtype: str) -> None:
    x, y = _half((3, 4), channels), _half((3, 4), channels, None)
    stride = in_fours(channels) if other_dtype == "float16" else channels
    other = image(2, (3, 4), channels, other_dtype, channel_stride=stride)
    a, b = _values(x), _values(other)
    for kernel, combine in (
        (add(Add(x, other, y, activation=Activation("relu"))), torch.add),
        (mul(Mul(x, other, y, activation=Activation("relu"))), torch.mul),
    ):
        result = _empty(y)
        run(kernel, stored(x, 2, a, RNG), stored(other, 2, b, RNG), result)
        want = combine(_wide(a), _wide(b)).relu().half()
        assert torch.equal(to_torch(logical(y, result)), want)


def test_one_value_a_channel() -> None:
    x, scale = _half((3, 4), 6), _half((1, 1), 6)
    a, b, result = _values(x), _values(scale), _empty(x)
    run(mul(Mul(x, scale, x)), stored(x, 2, a, RNG), stored(scale, 2, b, RNG), result)
    assert torch.equal(to_torch(logical(x, result)), (_wide(a) * _wide(b)).half())


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("y_dtype", ["float16", "float32"])
def test_pools(kind: str, y_dtype: str) -> None:
    x = _half((7, 6), 6)
    y = image(2, (4, 3), 6, y_dtype, channel_stride=8 if y_dtype == "float16" else 6)
    given, result = _values(x), _empty(y)
    given[0, 2, 2, 1] = np.inf
    workload = Pool2d(kind, x, y, (3, 3), (2, 2), (1, 1), count_include_pad=False)
    run(pool(workload), stored(x, 2, given, RNG), result)
    wide = _wide(given)
    if kind == "max":
        want = F.max_pool2d(wide, 3, 2, 1)
    else:
        want = F.avg_pool2d(wide, 3, 2, 1, count_include_pad=False)
    found = to_torch(logical(y, result).astype(np.float32))
    # nine float32 terms in another order; a rounding to float16 may then fall the other way, by 2**-10
    unit = 0.0 if kind == "max" else 2.0**-10 if y_dtype == "float16" else 1e-6
    torch.testing.assert_close(
        found, want.to(getattr(torch, y_dtype)).float(), rtol=unit, atol=1e-6
    )


def test_a_mean_of_large_values_is_finite() -> None:
    """Their sum is far beyond float16."""
    x, y = _half((9, 9), 4), _half((1, 1), 4)
    given, result = np.full((2, 9, 9, 4), 40000.0, np.float16), _empty(y)
    run(pool(Pool2d("average", x, y, (9, 9), (9, 9))), given, result)
    assert (logical(y, result) == np.float16(40000.0)).all()


def test_concatenation() -> None:
    parts = [_half((3, 4), channels) for channels in (3, 5, 4)]
    y = _half((3, 4), 12)
    values, result = [_values(part) for part in parts], _empty(y)
    memory = [stored(p, 2, v, RNG) for p, v in zip(parts, values, strict=True)]
    run(concat(Concat(tuple(parts), y, (None,) * 3)), *memory, result)
    assert (logical(y, result) == np.concatenate(values, -1)).all()


@pytest.mark.parametrize("orders", [("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "nhwc")])
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32")])
def test_casts(orders: tuple[str, str], dtypes: tuple[str, str]) -> None:
    layouts = [
        image(2, (3, 5), 3, dtype, channel_stride=4 if (dtype, order) == ("float16", "nhwc") else 3)
        for dtype, order in zip(dtypes, orders, strict=True)
    ]
    x, y = layouts
    given = _values(x) * 100
    given[0, 0, 0] = (np.inf, np.nan, 65519.0 if dtypes[0] == "float32" else 1.0)
    source = given.transpose(0, 3, 1, 2).copy() if orders[0] == "nchw" else stored(x, 2, given, RNG)
    result = _empty(y) if orders[1] == "nhwc" else np.empty((2, 3, 3, 5), y.dtype)
    run(convert(Convert(x, y, *orders)), source, result)
    found = logical(y, result) if orders[1] == "nhwc" else result.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, given.astype(y.dtype))


def test_quantized_from_float16_and_back() -> None:
    x, q = _half((3, 4), 6), image(2, (3, 4), 6)
    given, result = _values(x), np.zeros((2, *q.shape), np.uint8)
    workload = Convert(x, q, scale=20.0, requantize=Requantize(100, 0, 255))
    run(convert(workload), stored(x, 2, given, RNG), result)
    want = torch.ops.graphopt.quantize(
        torch.from_numpy(given.astype(np.float32)), 0.05, 100, 0, 255
    )
    assert (logical(q, result) == want.numpy()).all()
    back = _empty(x)
    run(convert(Convert(q, x, scale=0.05, x_zero_point=100)), result, back)
    floats = torch.ops.graphopt.dequantize(want, 0.05, 100)
    assert (logical(x, back) == floats.half().numpy()).all()


@pytest.mark.parametrize("channels", [3, 6])
def test_quantized_from_float32_of_odd_channels(channels: int) -> None:
    """Bytes have whole fours of channels and float32 has not: no channel is read that is not there."""
    x, q = image(2, (3, 4), channels, "float32"), image(2, (3, 4), channels)
    given, result = _values(x), np.zeros((2, *q.shape), np.uint8)
    run(convert(Convert(x, q, scale=20.0, requantize=Requantize(100, 0, 255))), given, result)
    want = torch.ops.graphopt.quantize(torch.from_numpy(given), 0.05, 100, 0, 255)
    assert (logical(q, result) == want.numpy()).all()
