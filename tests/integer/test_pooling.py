"""Pooling: windows, counts and rounding against torch and a plain loop."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.errors import IntegerizeError

graphopt = torch.ops.graphopt


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_max_pool2d_is_torchs_on_the_real_values(data: st.DataObject) -> None:
    draw = data.draw
    size, kernel = [draw(st.integers(1, 12)) for _ in "hw"], [draw(st.integers(1, 4)) for _ in "hw"]
    stride, dilation = (
        [draw(st.integers(1, 4)) for _ in "hw"],
        [draw(st.integers(1, 2)) for _ in "hw"],
    )
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = draw(st.booleans())
    reach = [
        s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)
    ]
    assume(min(reach) >= 1)
    q = torch.randint(0, 256, (2, 3, *size)).to(torch.uint8)
    pooled = graphopt.max_pool2d(q, kernel, stride, padding, dilation, ceil_mode)
    real = graphopt.dequantize(q, 0.1, 255)
    expected = functional.max_pool2d(real, kernel, stride, padding, dilation, ceil_mode)
    # A dilated window may hold padding alone: -inf in torch, the type's least value here.
    expected = expected.nan_to_num(neginf=-25.5)
    assert torch.equal(graphopt.dequantize(pooled, 0.1, 255), expected)
    fake = torch._subclasses.FakeTensorMode().from_tensor(q)
    shape = graphopt.max_pool2d(fake, kernel, stride, padding, dilation, ceil_mode).shape
    assert shape == expected.shape


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_avg_pool2d_is_within_one_step_of_torch_and_exact_where_not_at_a_tie(
    data: st.DataObject,
) -> None:
    draw = data.draw
    size, kernel = [draw(st.integers(1, 12)) for _ in "hw"], [draw(st.integers(1, 4)) for _ in "hw"]
    stride = [draw(st.integers(1, 4)) for _ in "hw"]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    assume(all(s + 2 * p >= k for s, p, k in zip(size, padding, kernel, strict=True)))
    mode = (draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 0, 3])))
    zero, multiplier = draw(st.integers(0, 255)), draw(st.sampled_from([1.0, 0.7, 1.9]))
    q = torch.randint(0, 256, (2, 3, *size)).to(torch.uint8)
    y = graphopt.avg_pool2d(q, kernel, stride, padding, *mode, multiplier, zero, 60, 0, 255)
    real = q.to(torch.float64) - zero
    exact = functional.avg_pool2d(real, kernel, stride, padding, *mode[:2], mode[2] or None)
    exact = torch.clamp(exact * multiplier, -60, 195)
    assert y.shape == exact.shape
    # float32(sum) * float32(m / count) errs by less than 2**-22 of 255 * 16 * 1.9.
    assert ((y.to(torch.float64) - 60 - exact).abs() <= 0.5 + 0.002).all()


def test_avg_pool2d_rounds_ties_to_even() -> None:
    q = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8).reshape(1, 3, 1, 2)
    y = graphopt.avg_pool2d(q, [1, 2], [1, 2], [0, 0], False, True, 0, 1.0, 0, 0, 0, 255)
    assert y.flatten().tolist() == [2, 4, 6]  # 1.5, 3.5, 5.5
    z = graphopt.avg_pool2d(q - 1, [1, 2], [1, 2], [0, 0], False, True, 0, 1.0, 0, 0, 0, 255)
    assert z.flatten().tolist() == [0, 2, 4]  # 0.5, 2.5, 4.5


def test_padding_counts_only_where_torch_counts_it() -> None:
    q = torch.full((1, 1, 2, 2), 90, dtype=torch.uint8)
    arguments = (q, [3, 3], [1, 1], [1, 1], False)
    counted = graphopt.avg_pool2d(*arguments, True, 0, 1.0, 0, 0, 0, 255)
    assert counted.flatten().tolist() == [40] * 4
    skipped = graphopt.avg_pool2d(*arguments, False, 0, 1.0, 0, 0, 0, 255)
    assert skipped.flatten().tolist() == [90] * 4


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 255), st.booleans(), st.integers(0, 2**31)
)
def test_global_avg_pool_is_one_float32_product_of_the_sum(
    height: int, width: int, zero: int, keepdim: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (2, 5, height, width), generator=generator).to(torch.uint8)
    y = graphopt.global_avg_pool(q, 0.9, zero, 20, 2, 250, keepdim)
    total = (q.numpy().astype(numpy.int64) - zero).sum((2, 3), keepdims=keepdim)
    factor = numpy.float32(numpy.float64(0.9) / (height * width))
    expected = numpy.clip(numpy.rint(total.astype(numpy.float32) * factor) + 20, 2, 250)
    assert y.numpy().shape == expected.shape
    assert numpy.array_equal(y.numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.uint8, torch.int8]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 127),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_global_avg_pool_dequantize_is_the_sum_times_one_float32_factor(
    dtype: torch.dtype, height: int, width: int, zero: int, keepdim: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    least = torch.iinfo(dtype).min
    q = torch.randint(least, least + 256, (2, 5, height, width), generator=generator).to(dtype)
    scale = float(numpy.float32(0.0173))
    y = graphopt.global_avg_pool_dequantize(q, scale, zero, keepdim)
    total = (q.numpy().astype(numpy.int64) - zero).sum((2, 3), keepdims=keepdim)
    factor = numpy.float32(numpy.float64(scale) / (height * width))
    assert y.dtype == torch.float32
    assert y.shape == total.shape
    assert numpy.array_equal(y.numpy(), total.astype(numpy.float32) * factor)
    # Two roundings of half a ulp each, beside the exact mean of the real values.
    exact = total.astype(numpy.float64) * scale / (height * width)
    assert (numpy.abs(y.numpy() - exact) <= 2**-23 * numpy.abs(exact) * 1.01).all()


def test_a_global_sum_beyond_24_bits_is_rounded_once() -> None:
    """300 x 300 elements sum to more than 2**24, where float32 partial sums would round every step."""
    q = torch.full((1, 1, 300, 300), 255, dtype=torch.uint8)
    q[0, 0, ::2] = 254
    total = 255 * 45000 + 254 * 45000
    assert total > 2**24
    y = graphopt.global_avg_pool_dequantize(q, 1.0, 0, False)
    assert y.item() == numpy.float32(total) * numpy.float32(1 / 90000)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("q must be [N, C, H, W], not of rank 3", (torch.zeros(1, 4, 4), 1.0, 0)),
        ("q must be uint8 or int8, not torch.float32", (torch.zeros(1, 1, 4, 4), 1.0, 0)),
        ("q's zero point must be within 0..255 of q, not -1", (torch.zeros(1, 1, 4, 4), 1.0, -1)),
        ("the map must be of 1 to 8421504 elements", (torch.zeros(1, 1, 0, 4), 1.0, 0)),
    ],
)
def test_a_global_average_in_float_names_what_does_not_fit(
    message: str, arguments: tuple[torch.Tensor, float, int]
) -> None:
    q, multiplier, zero_point = arguments
    q = q if "float32" in message else q.to(torch.uint8)
    with pytest.raises(IntegerizeError) as caught:
        graphopt.global_avg_pool_dequantize(q, multiplier, zero_point, True)
    assert str(caught.value) == f"graphopt::global_avg_pool_dequantize: {message}"


def test_arguments_that_do_not_fit_are_named() -> None:
    q = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for message, call in (
        (
            "kernel must be two numbers of at least 1, not [2]",
            lambda: graphopt.max_pool2d(q, [2], [1, 1], [0, 0], [1, 1], False),
        ),
        (
            "padding must be at most half of the kernel",
            lambda: graphopt.max_pool2d(q, [2, 2], [1, 1], [2, 0], [1, 1], False),
        ),
        (
            "the padded q must be as large as the kernel",
            lambda: graphopt.max_pool2d(q, [5, 2], [1, 1], [0, 0], [1, 1], False),
        ),
        (
            "q must be [N, C, H, W], not of rank 3",
            lambda: graphopt.max_pool2d(q[0], [2, 2], [1, 1], [0, 0], [1, 1], False),
        ),
    ):
        with pytest.raises(IntegerizeError) as caught:
            call()
        assert str(caught.value) == f"graphopt::max_pool2d: {message}"
