from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.passes.compact import OneByOneSubstitute
from tests.passes.compact.support import GEOMETRIES, capture, convolution, smooth, substituted
from tests.passes.helpers import operators, reasons, rewrites

X = smooth(8, 16, 12, 12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("data", [True, False])
def test_a_filter_of_its_middle_alone_is_kept(geometry: dict[str, Any], data: bool) -> None:
    """The middle tap stands where it stood, for every stride, padding and dilation."""
    conv = convolution(16, 24, **geometry)
    keep = torch.zeros(3, 3)
    keep[1, 1] = 1
    conv.weight.data *= keep
    pass_ = OneByOneSubstitute(calibration=[X] if data else None)
    result, error = substituted(conv, pass_, X)
    assert operators(result)[-1] == "conv2d"
    assert error < 1e-5


def test_is_the_least_squares_solution() -> None:
    """Nearer than the middle tap, than the sum of the taps, and than itself moved a little."""
    conv = convolution(16, 24, padding=1)
    result, error = substituted(conv, OneByOneSubstitute(calibration=[X], rows=10**6), X)
    program = capture(conv, X)
    weight = result.graph_module.get_parameter("weight_compact_point").detach()
    bias = result.graph_module.get_parameter("weight_compact_point_bias").detach()
    with torch.no_grad():
        want = program(X)
        spread = (want - want.mean((0, 2, 3), keepdim=True)).norm()
        for other in (
            conv.weight[:, :, 1:2, 1:2],
            conv.weight.sum((2, 3), keepdim=True),
            weight * 1.1,
        ):
            made = F.conv2d(X, other)
            made += (want - made).mean((0, 2, 3), keepdim=True)
            assert float((want - made).norm() / spread) > error
        assert float((want - F.conv2d(X, weight, bias)).norm() / spread) == pytest.approx(error)
    assert result.history[-1].layers[0].error == pytest.approx(error, rel=0.1)


def test_counts_and_no_bias_before() -> None:
    conv = convolution(16, 24, bias=False, padding=1)
    result = OneByOneSubstitute(calibration=[X])(capture(conv, X))
    (layer,) = result.history[-1].layers
    assert layer.parameters == (24 * 16 * 9, 24 * 16 + 24)
    assert layer.parameters[1] == result.stats().parameters
    assert layer.macs == (24 * 16 * 9 * 8 * 144, 24 * 16 * 8 * 144)


def test_half_of_the_layers_unless_told() -> None:
    model = nn.Sequential(*[convolution(16, 16, padding=1) for _ in range(4)])
    program = capture(model, X)
    assert rewrites(OneByOneSubstitute()(program)) == 2
    every = OneByOneSubstitute(share=1.0)(program)
    assert rewrites(every) == 4
    assert rewrites(OneByOneSubstitute(share=1.0)(every)) == 0


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (convolution(16, 24, 1), "its kernel is 1 x 1, not 3 x 3"),
        (convolution(16, 24, groups=2), "its 2 groups do not mix channels"),
    ],
)
def test_declines(conv: nn.Conv2d, reason: str) -> None:
    assert reasons(OneByOneSubstitute()(capture(conv, X))) == [reason]


def test_declines_weights_that_are_no_numbers() -> None:
    conv = convolution(16, 24)
    conv.weight.data[0, 0, 0, 0] = float("nan")
    assert reasons(OneByOneSubstitute()(capture(conv, X))) == ["its weight holds NaN or infinity"]
