"""Sums, products, concatenation and conversions, run by the interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.workload import Activation, Add, Concat, Convert, Layout, Mul, Requantize
from graphopt.backends.cuda.pointwise import add, concat, convert, mul
from tests.backends.cpu.conv_harness import RESIDUAL_ADD
from tests.backends.cuda.harness import Array, image, logical, stored, to_torch
from tests.backends.cuda.simt import run

RNG = np.random.default_rng(2)


def _bytes(*shape: int) -> Array:
    return RNG.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("batch", [2, None])
def test_integer_sum(batch: int | None, dtype: str) -> None:
    layout = image(batch, (5, 3), 10, dtype)
    a, b = _bytes(2, 5, 3, 10).view(dtype), _bytes(2, 5, 3, 10).view(dtype)
    y = np.zeros((2, *layout.shape), dtype)
    p = RESIDUAL_ADD if dtype == "uint8" else replace(RESIDUAL_ADD, qmin=-128, qmax=127)
    run(
        add(Add(layout, layout, layout, p)),
        stored(layout, 2, a, RNG),
        stored(layout, 2, b, RNG),
        y,
    )
    numbers = (p.a_multiplier, p.b_multiplier, p.shift, p.a_zero_point, p.b_zero_point)
    bounds = (p.zero_point, p.qmin, p.qmax)
    want = torch.ops.graphopt.add(to_torch(a), to_torch(b), *numbers, *bounds)
    assert (logical(layout, y) == want.numpy().transpose(0, 2, 3, 1)).all()


def test_float_sum_and_product_with_an_activation() -> None:
    x, scale = image(2, (4, 3), 5, "float32"), image(2, (1, 1), 5, "float32")
    a = RNG.standard_normal((2, 4, 3, 5)).astype(np.float32)
    b = RNG.standard_normal((2, 1, 1, 5)).astype(np.float32)
    y = np.zeros_like(a)
    run(add(Add(x, x, x, activation=Activation("relu"))), a, a, y)
    assert (y == np.maximum(a + a, 0)).all()
    run(mul(Mul(x, scale, x)), a, b, y)
    assert (y == a * b).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("channels", [(8, 4, 12), (8, 5, 12), (3, 2, 1)])
def test_concatenation(channels: tuple[int, ...], dtype: str) -> None:
    inputs = tuple(image(2, (3, 2), c, dtype) for c in channels)
    y = image(2, (3, 2), sum(channels), dtype)
    values = [_bytes(2, 3, 2, c).view(dtype) for c in channels]
    memory = [stored(x, 2, v, RNG) for x, v in zip(inputs, values, strict=True)]
    result = np.zeros((2, *y.shape), dtype)
    run(concat(Concat(inputs, y, (None,) * 3)), *memory, result)
    assert (logical(y, result) == np.concatenate(values, -1)).all()


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_quantize_from_nchw(channels: int) -> None:
    x = Layout(2, 5, 6, channels, "float32")
    y = image(2, (5, 6), channels)
    values = RNG.standard_normal((2, channels, 5, 6)).astype(np.float32) * 3
    values[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    inverse = float(torch.tensor(1.0) / torch.tensor(0.03))
    result = np.zeros((2, *y.shape), np.uint8)
    rounding = Requantize(100, 2, 255)
    run(convert(Convert(x, y, "nchw", "nhwc", inverse, requantize=rounding)), values, result)
    want = torch.ops.graphopt.quantize(torch.from_numpy(values), 0.03, 100, 2, 255)
    assert (logical(y, result) == want.numpy().transpose(0, 2, 3, 1)).all()


def test_dequantize_to_nchw() -> None:
    x, y = image(2, (5, 6), 10), Layout(2, 5, 6, 10, "float32")
    values = _bytes(2, 5, 6, 10)
    result = np.zeros((2, 10, 5, 6), np.float32)
    workload = Convert(x, y, "nhwc", "nchw", 0.1, x_zero_point=7)
    run(convert(workload), stored(x, 2, values, RNG), result)
    assert (result == torch.ops.graphopt.dequantize(to_torch(values), 0.1, 7).numpy()).all()


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [("uint8", Requantize(3, 3, 200)), ("int8", Requantize(-30, -120, 90))],
)
def test_requantize(dtype: str, rounding: Requantize) -> None:
    layout = image(2, (3, 3), 9, dtype)
    values = _bytes(2, 3, 3, 9).view(dtype)
    result = np.zeros((2, *layout.shape), dtype)
    workload = Convert(layout, layout, scale=0.7, x_zero_point=20, requantize=rounding)
    run(convert(workload), stored(layout, 2, values, RNG), result)
    bounds = (rounding.zero_point, rounding.qmin, rounding.qmax)
    want = torch.ops.graphopt.requantize(torch.from_numpy(values), 0.7, 20, *bounds)
    assert (logical(layout, result) == want.numpy()).all()


@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        (Activation("relu6"), torch.nn.functional.relu6),
        (Activation("leaky_relu", low=0.1), lambda x: torch.nn.functional.leaky_relu(x, 0.1)),
        (Activation("clamp", -1.0, 0.5), lambda x: x.clamp(-1.0, 0.5)),
        (Activation("sigmoid"), torch.sigmoid),
        (Activation("silu"), torch.nn.functional.silu),
        (Activation("hard_sigmoid"), torch.nn.functional.hardsigmoid),
        (Activation("hard_swish"), torch.nn.functional.hardswish),
        (Activation("tanh"), torch.tanh),
        (Activation("gelu"), torch.nn.functional.gelu),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_activations(activation: Activation, reference: object) -> None:
    layout = image(1, (4, 4), 4, "float32")
    values = (RNG.standard_normal((1, 4, 4, 4)) * 4).astype(np.float32)
    values[0, 0, 0, 0] = np.nan
    result = np.zeros_like(values)
    run(convert(Convert(layout, layout, activation=activation)), values, result)
    want = reference(torch.from_numpy(values)).numpy()  # type: ignore[operator]
    # functions of float32 that agree to an ulp or two, times values of about 10
    np.testing.assert_allclose(result, want, rtol=2e-6, atol=2e-6)
