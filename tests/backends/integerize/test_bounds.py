"""``quantize(clamp(v, a, b)) = clamp(quantize(v), quantize(a), quantize(b))``, and which clamps stay on the grid."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.backends.integerize import bounds
from graphopt.integer import QParams

LIMITS = st.one_of(st.floats(-20, 20), st.just(-math.inf), st.just(math.inf))
graphopt = torch.ops.graphopt


@settings(max_examples=200, deadline=None)
@given(LIMITS, LIMITS, st.floats(0.001, 0.5), st.integers(0, 255), st.integers(0, 2**31))
@example(0.0, 6.0, 0.0417, 3, 0)
@example(0.5, 1.5, 1.0, 10, 0)
def test_a_clamp_before_quantization_is_a_range_of_integers(
    low: float, high: float, scale: float, zero_point: int, seed: int
) -> None:
    low, high = min(low, high), max(low, high)
    qparams = QParams(scale, zero_point)
    narrow = bounds.narrow(qparams, low, high)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=generator) * 12
    clamped = graphopt.quantize(x.clamp(low, high), qparams.scale, zero_point, 0, 255)
    direct = graphopt.quantize(x, qparams.scale, zero_point, narrow.qmin, narrow.qmax)
    assert torch.equal(direct, clamped)


@settings(max_examples=200, deadline=None)
@given(LIMITS, LIMITS, st.sampled_from([0.25, 0.05, 1.0]), st.integers(0, 255))
@example(-2.0, 6.0, 0.25, 100)
@example(30.0, 40.0, 0.05, 0)
def test_an_exact_clamp_of_dequantized_values_is_one_of_integers(
    low: float, high: float, scale: float, zero_point: int
) -> None:
    low, high = min(low, high), max(low, high)
    qparams = QParams(scale, zero_point)
    q = torch.arange(256, dtype=torch.uint8)
    real = graphopt.dequantize(q, scale, zero_point).clamp(low, high)
    narrow = bounds.narrow(qparams, low, high)
    integers = q.clamp(narrow.qmin, narrow.qmax)
    on_grid = torch.equal(graphopt.dequantize(integers, scale, zero_point), real)
    if bounds.is_exact(qparams, low, high):
        assert on_grid
    else:
        assert not on_grid
