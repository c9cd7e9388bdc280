"""``quantize``, ``dequantize``, ``requantize`` and ``add`` against torch, ONNX Runtime and exact rationals."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.errors import IntegerizeError
from graphopt.integer import FixedPointAdd
from tests.integer.oracles import onnx_runtime

graphopt = torch.ops.graphopt
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SCALES = st.floats(2.0**-20, 2.0**13, width=32)
BYTES = torch.arange(256, dtype=torch.uint8)


@settings(max_examples=200, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=20), SCALES, st.integers(0, 255))
@example([0.5, 1.5, 2.5, -0.5, -1.5, 1e38, -1e38], 1.0, 3)
def test_quantize_then_dequantize_is_torch_fake_quantize(
    values: list[float], scale: float, zero_point: int
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    q = graphopt.quantize(x, scale, zero_point, 0, 255)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    assert q.dtype == torch.uint8
    assert torch.equal(graphopt.dequantize(q, scale, zero_point), expected)


@settings(max_examples=100, deadline=None)
@given(SCALES, st.integers(-128, 127), st.integers(0, 2**31))
def test_signed_quantize_is_torch_fake_quantize(scale: float, zero_point: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, generator=generator) * scale * 80
    q = graphopt.quantize(x, scale, zero_point, -128, 127)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    assert q.dtype == torch.int8
    assert torch.equal(graphopt.dequantize(q, scale, zero_point), expected)


def test_quantize_rounds_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    q = graphopt.quantize(x, 1.0, 10, 0, 255)
    assert q.tolist() == [10, 12, 12, 14, 10, 8, 8]


def test_quantize_maps_nan_to_qmin_and_saturates_infinities() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    assert graphopt.quantize(x, 0.1, 7, 2, 250).tolist() == [2, 250, 2]
    assert graphopt.quantize(x, 0.1, 0, -127, 127).tolist() == [-127, 127, -127]


def test_quantize_equals_onnx_runtime() -> None:
    # The scale is a power of two: ONNX divides by it where we multiply by its inverse.
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 8
    scale, zero_point = numpy.float32(0.0625), numpy.uint8(131)
    expected = onnx_runtime("QuantizeLinear", [x.numpy(), scale, zero_point], "uint8")
    assert numpy.array_equal(graphopt.quantize(x, 0.0625, 131, 0, 255).numpy(), expected)


def test_a_channels_last_input_gives_a_contiguous_result() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    q = graphopt.quantize(x, 0.1, 3, 0, 255)
    assert q.is_contiguous()
    assert graphopt.dequantize(q.to(memory_format=torch.channels_last), 0.1, 3).is_contiguous()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_unusable_scales_are_refused(scale: float) -> None:
    with pytest.raises(IntegerizeError, match=r"the scale is .*; it must be a positive float32"):
        graphopt.quantize(torch.ones(1), scale, 0, 0, 255)
    with pytest.raises(IntegerizeError, match=r"the scale is .*; it must be a positive float32"):
        graphopt.dequantize(BYTES, scale, 0)
    with pytest.raises(IntegerizeError, match=r"the multiplier is .*; it must be a positive"):
        graphopt.requantize(BYTES, scale, 0, 0, 0, 255)


def test_wrong_types_and_ranges_are_named() -> None:
    message = "^graphopt::quantize: x must be float32, not torch.float64$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.quantize(torch.ones(1, dtype=torch.float64), 1.0, 0, 0, 255)
    message = r"^the range 0\.\.256 is no part of uint8 \(0\.\.255\) or int8 \(-128\.\.127\)$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.quantize(torch.ones(1), 1.0, 0, 0, 256)
    message = r"^graphopt::dequantize: q must be uint8 or int8, not torch.int32$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.dequantize(BYTES.to(torch.int32), 1.0, 0)
    message = r"^graphopt::dequantize: q's zero point must be within 0\.\.255 of q, not -3$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.dequantize(BYTES, 1.0, -3)


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-10, 2.0**10, width=32), st.integers(0, 255), st.integers(0, 255))
@example(0.5, 0, 0)
def test_requantize_rounds_one_float32_product_half_to_even(
    multiplier: float, x_zero_point: int, y_zero_point: int
) -> None:
    product = (numpy.arange(256) - x_zero_point).astype(numpy.float32) * numpy.float32(multiplier)
    expected = [min(max(round(float(v)) + y_zero_point, 5), 200) for v in product]
    q = graphopt.requantize(BYTES, multiplier, x_zero_point, y_zero_point, 5, 200)
    assert q.tolist() == expected


def test_a_lone_relu_is_a_requantize_by_one() -> None:
    q = graphopt.requantize(BYTES, 1.0, 100, 100, 100, 255)
    real = graphopt.dequantize(BYTES, 0.3, 100)
    assert torch.equal(graphopt.dequantize(q, 0.3, 100), torch.relu(real))


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.floats(1e-3, 10), st.integers(0, 2**31))
def test_add_is_the_rounded_rational_sum(
    a_scale: float, b_scale: float, y_scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 256, (40,), generator=generator).to(torch.uint8) for _ in "ab")
    fixed = FixedPointAdd.of(a_scale, b_scale, y_scale)
    arguments = (fixed.a_multiplier, fixed.b_multiplier, fixed.shift)
    q = graphopt.add(a, b, *arguments, 7, 200, 90, 3, 250)
    for left, right, result in zip(a.tolist(), b.tolist(), q.tolist(), strict=True):
        real = Fraction(a_scale) * (left - 7) + Fraction(b_scale) * (right - 200)
        real /= Fraction(y_scale)
        clamped = min(max(real, Fraction(3 - 90)), Fraction(250 - 90))
        # Fixed point errs by 255 * 2**-20 of the larger input's step, float32 by 2**-24 of the sum.
        coarser = Fraction(max(a_scale, b_scale)) / Fraction(y_scale)
        slack = Fraction(1, 1000) * max(coarser, Fraction(1))
        assert abs(Fraction(result - 90) - clamped) <= Fraction(1, 2) + slack


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**21) + 1, 2**21 - 1), st.integers(-(2**21) + 1, 2**21 - 1), st.integers())
def test_add_is_exact_integer_arithmetic(first: int, second: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    a, b = (torch.randint(0, 256, (64,), generator=generator).to(torch.uint8) for _ in "ab")
    exact = (a.numpy().astype(numpy.int64) - 3) * first + (
        b.numpy().astype(numpy.int64) - 250
    ) * second
    scaled = exact.astype(numpy.float32) * numpy.float32(2.0**-21)
    expected = numpy.clip(numpy.rint(scaled) + 128, 0, 255)
    q = graphopt.add(a, b, first, second, 21, 3, 250, 128, 0, 255)
    assert numpy.array_equal(q.numpy(), expected)


def test_add_of_equal_scales_rounds_ties_to_even() -> None:
    fixed = FixedPointAdd.of(1.0, 1.0, 2.0)
    a = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.uint8)
    arguments = (fixed.a_multiplier, fixed.b_multiplier, fixed.shift)
    assert graphopt.add(a, zero, *arguments, 0, 0, 0, 0, 255).tolist() == [0, 1, 2, 2, 2]


def test_add_broadcasts() -> None:
    a = torch.full((2, 3, 4), 10, dtype=torch.uint8)
    b = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1)
    q = graphopt.add(a, b, 2**20, 2**20, 20, 0, 0, 0, 0, 255)
    assert q.shape == (2, 3, 4)
    assert q[0, :, 0].tolist() == [11, 12, 13]


def test_add_refuses_wide_multipliers() -> None:
    message = r"^graphopt::add: each multiplier must be below 2\*\*21 in magnitude$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.add(BYTES, BYTES, 2**21, 1, 0, 0, 0, 0, 0, 255)
    message = r"^graphopt::add: shift must be within -127\.\.126, not 127$"
    with pytest.raises(IntegerizeError, match=message):
        graphopt.add(BYTES, BYTES, 1, 1, 127, 0, 0, 0, 0, 255)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-18, 1e18), st.floats(1e-18, 1e18))
def test_fixed_point_multipliers_take_the_largest_shift(a_scale: float, y_scale: float) -> None:
    fixed = FixedPointAdd.of(a_scale, a_scale / 3, y_scale)
    assert fixed.a_multiplier < 2**21
    assert fixed.shift == 126 or round(a_scale / y_scale * 2.0 ** (fixed.shift + 1)) >= 2**21
