"""Scales and zero points."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.passes.quantize.qparams import activation_qparams, weight_scales
from graphopt.passes.quantize.spec import ActivationSpec, WeightSpec

ends = st.floats(width=32, allow_nan=False, allow_infinity=False)
NO_FLOOR = torch.zeros(3, dtype=torch.float64)


@settings(max_examples=300, deadline=None)
@given(ends, ends, st.integers(2, 8), st.booleans())
@example(0.0, 0.0, 8, False)
@example(1e-45, 2e-45, 8, False)
@example(-3.4e38, 3.4e38, 8, False)
@example(5.0, 6.0, 8, True)
def test_any_range_gives_valid_parameters_that_hold_it(a, b, bits, symmetric):
    low, high = sorted((a, b))
    qparams = activation_qparams(low, high, ActivationSpec(bits, symmetric))
    assert qparams.scale == float(np.float32(qparams.scale))
    assert 2.0**-126 <= qparams.scale <= 2.0**126
    assert isinstance(qparams.zero_point, int)
    assert qparams.qmin <= qparams.zero_point <= qparams.qmax
    if qparams.scale < 2.0**126:  # a wider range cannot be held by any allowed scale
        bottom = (qparams.qmin - qparams.zero_point) * qparams.scale
        top = (qparams.qmax - qparams.zero_point) * qparams.scale
        slack = 0.5001 * qparams.scale  # the zero point is rounded
        assert bottom - slack <= min(low, 0.0)
        assert top + slack >= max(high, 0.0)


def test_zero_is_exact_in_torch():
    qparams = activation_qparams(-0.7, 2.3, ActivationSpec())
    zero = torch.fake_quantize_per_tensor_affine(
        torch.zeros(1), qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax
    )
    assert float(zero) == 0.0


def test_the_equation():
    qparams = activation_qparams(-1.0, 3.0, ActivationSpec())
    assert qparams.scale == float(np.float32(4.0 / 255.0))
    assert qparams.zero_point == 64


def test_a_symmetric_range_has_its_zero_point_in_the_middle():
    qparams = activation_qparams(-1.0, 3.0, ActivationSpec(symmetric=True))
    assert (qparams.scale, qparams.zero_point) == (float(np.float32(3.0 / 127.0)), 128)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_what_is_no_range_is_an_error(low, high):
    with pytest.raises(ValueError, match="is no range"):
        activation_qparams(low, high, ActivationSpec())


def test_weight_scales_by_channel_and_by_tensor():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25], [0.0, 0.0]])
    scales = weight_scales(weight, WeightSpec(), NO_FLOOR)
    assert torch.equal(scales, torch.tensor([2.0 / 127, 0.5 / 127, 0.5 / 127]))
    scales = weight_scales(weight, WeightSpec(per_channel=False), NO_FLOOR)
    assert torch.equal(scales, torch.tensor([2.0 / 127]))


def test_weights_of_zero_have_scale_one():
    assert torch.equal(weight_scales(torch.zeros(3, 4), WeightSpec(), NO_FLOOR), torch.ones(3))


def test_the_floor_bounds_scales_from_below():
    floor = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    scales = weight_scales(torch.full((3, 2), 0.127), WeightSpec(), floor)
    assert scales[1] == 1.0
    assert scales[0] < 0.01


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_the_best_of_a_finer_search(bits):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 400, generator=generator) ** 3
    spec = WeightSpec(bits=bits, observer="mse")
    found = weight_scales(weight, spec, NO_FLOOR).double()

    def error(scales):
        steps = (weight / scales[:, None]).round().clamp(spec.qmin, spec.qmax)
        return (steps * scales[:, None] - weight).square().sum(dim=1)

    full = weight.abs().amax(dim=1).double() / spec.qmax
    best = torch.stack([error(full * f) for f in np.linspace(0.3, 1.0, 700)]).amin(dim=0)
    assert (error(found) <= 1.05 * best).all()  # the grid of 70 fractions against one of 700
    assert (error(found) <= (1 + 1e-6) * error(full)).all()  # scales are rounded to float32
