from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import PassError
from graphopt.passes.compact import InceptionFactorize
from tests.passes.compact.support import GEOMETRIES, capture, convolution, smooth, substituted
from tests.passes.helpers import operators, reasons, rewrites

X = smooth(8, 16, 13, 13)


def separable(conv: nn.Conv2d, rank: int) -> nn.Conv2d:
    """Weights that are a 1 x n and an n x 1 of that width."""
    outputs, inputs, size, _ = conv.weight.shape
    a, b = torch.randn(rank, inputs, size), torch.randn(outputs, rank, size)
    conv.weight.data = torch.einsum("omy,mix->oiyx", b, a) / 20
    return conv


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_separable_filter_is_kept_for_any_stride_padding_and_dilation(
    geometry: dict[str, Any],
) -> None:
    conv = separable(convolution(16, 24, **geometry), 8)
    pass_ = InceptionFactorize(relu=False, width=0.5)
    result, error = substituted(conv, pass_, X)
    assert operators(result) == ["conv2d", "conv2d"]
    assert error < 1e-3  # of the ridge


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 2},
        {"padding": 0, "stride": (1, 2)},
        {"padding": 1},
        {"padding": 4, "dilation": 2},
    ],
    ids=str,
)
def test_the_error_of_two_3x3_is_the_layers_own(geometry: dict[str, Any]) -> None:
    """Found on sampled windows of 5 x 5; a wrong geometry would show as an error near 1 or above."""
    conv = convolution(16, 24, 5, **geometry)
    x = smooth(48, 16, 13, 13)
    result, error = substituted(conv, InceptionFactorize(calibration=[x], width=0.5), x)
    assert operators(result) == ["conv2d", "relu", "conv2d"]
    found = result.history[-1].layers[0].error
    assert found is not None
    assert error == pytest.approx(found, rel=0.2)  # of all rows, and of the quarter held out
    assert error < 0.75


def test_auto_stacks_5x5_and_splits_the_others() -> None:
    texts = []
    for size in (3, 5, 7):
        program = capture(convolution(16, 16, size, padding=size // 2), X)
        result = InceptionFactorize()(program)
        (layer,) = result.history[-1].layers
        assert operators(result) == ["conv2d", "relu", "conv2d"]
        assert layer.parameters[1] == result.stats().parameters
        assert layer.macs[1] == result.stats().macs
        texts.append(layer.text)
    assert texts == [
        "1 x 3, 3 x 1 over 16",
        "3 x 3, 3 x 3 over 16",
        "1 x 7, 7 x 1 over 16",
    ]


@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("size", [3, 5])
def test_counts_are_those_of_the_new_program(size: int, stride: Any) -> None:
    conv = convolution(16, 16, size, padding=size // 2, stride=stride)
    result = InceptionFactorize(width=0.5)(capture(conv, X))
    (layer,) = result.history[-1].layers
    assert (layer.parameters[1], layer.macs[1]) == (result.stats().parameters, result.stats().macs)


def test_more_width_and_data_lose_less() -> None:
    conv = convolution(16, 32, 5, padding=2)
    passes = (
        InceptionFactorize(calibration=[X], form="asymmetric"),
        InceptionFactorize(calibration=[X], form="asymmetric", width=0.25),
        InceptionFactorize(form="asymmetric", width=0.25),
    )
    errors = [substituted(conv, pass_, X)[1] for pass_ in passes]
    assert errors[0] < errors[1] < errors[2]


def test_a_second_run_changes_nothing() -> None:
    pass_ = InceptionFactorize()
    once = pass_(capture(convolution(16, 16, 5, padding=2), X))
    again = pass_(once)
    assert rewrites(again) == 0
    assert set(reasons(again)) == {"it is part of a substitute already"}


def test_all_parts_train() -> None:
    result = InceptionFactorize()(capture(convolution(16, 16, 5, padding=2), X))
    result(X).square().mean().backward()
    assert all(bool(p.grad.any()) for p in result.graph_module.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in result.graph_module.parameters()) == 4


@pytest.mark.parametrize(
    ("conv", "options", "reason"),
    [
        (convolution(16, 16, 4), {}, "its kernel is 4 x 4: not square, odd and at least 3"),
        (convolution(16, 16, (1, 3)), {}, "its kernel is 1 x 3: not square, odd and at least 3"),
        (convolution(16, 16, 3), {"form": "stacked"}, "its kernel is 3 x 3, not 5 x 5"),
        (
            convolution(16, 48, 3),
            {"width": 2.0},
            "its substitute has 9,264 parameters and 8,921,088 MACs for 6,960 and 6,690,816",
        ),
    ],
)
def test_declines(conv: nn.Conv2d, options: dict[str, Any], reason: str) -> None:
    result = InceptionFactorize(**options)(capture(conv, X))
    assert rewrites(result) == 0
    if "substitute" in reason:
        assert reasons(result)[0].startswith("its substitute has ")
    else:
        assert reasons(result) == [reason]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width must be positive, not 0.0"),
        ({"form": "round"}, "form must be auto, asymmetric or stacked, not 'round'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=f"^inception-factorize: {re.escape(message)}$"):
        InceptionFactorize(**options)
