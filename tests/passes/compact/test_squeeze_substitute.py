from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import PassError
from graphopt.passes.compact import SqueezeSubstitute
from tests.passes.compact.support import GEOMETRIES, capture, convolution, smooth, substituted
from tests.passes.helpers import network, operators, reasons, rewrites

X = smooth(8, 16, 12, 12)


def test_a_fire_module_takes_the_layers_place() -> None:
    program = capture(convolution(16, 32, padding=1), X)
    result = SqueezeSubstitute(calibration=[X])(program)
    assert operators(program) == ["conv2d"]
    assert operators(result) == ["conv2d", "relu", "conv2d", "conv2d", "concat"]
    shapes = {name: tuple(p.shape) for name, p in result.graph_module.named_parameters()}
    assert shapes == {
        "weight_compact_squeeze": (8, 16, 1, 1),
        "weight_compact_squeeze_bias": (8,),
        "weight_compact_expand1": (16, 8, 1, 1),
        "weight_compact_expand1_bias": (16,),
        "weight_compact_expand3": (16, 8, 3, 3),
        "weight_compact_expand3_bias": (16,),
    }
    (layer,) = result.history[-1].layers
    stats = result.stats()
    assert layer.text == "fire 8 -> 16 + 16"
    assert layer.parameters == (32 * 16 * 9 + 32, stats.parameters)
    assert layer.macs == (program.stats().macs, stats.macs)
    assert rewrites(result) == 1


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_error_is_the_layers_own_for_any_stride_padding_and_dilation(
    geometry: dict[str, Any],
) -> None:
    """Found on sampled windows; a wrong geometry would show as an error near 1 or above."""
    result, error = substituted(
        convolution(16, 24, **geometry), SqueezeSubstitute(calibration=[X], squeeze=0.5), X
    )
    found = result.history[-1].layers[0].error
    assert found is not None
    assert error == pytest.approx(found, rel=0.15)  # of all rows, and of the quarter held out
    assert error < 0.7


def test_weights_that_are_a_fire_module_are_found() -> None:
    conv = convolution(16, 32, padding=1)
    torch.manual_seed(1)
    low = torch.randn(32, 4, 3, 3)
    low[:16, :, :, [0, 2]] = 0
    low[:16, :, [0, 2]] = 0
    conv.weight.data = torch.einsum("omyx,mi->oiyx", low, torch.rand(4, 16)) / 30
    _, error = substituted(conv, SqueezeSubstitute(calibration=[X]), X)
    _, other = substituted(convolution(16, 32, padding=1), SqueezeSubstitute(calibration=[X]), X)
    assert error < 0.1 < other


def test_data_and_width_help() -> None:
    conv = convolution(16, 32, padding=1)
    passes = (
        SqueezeSubstitute(calibration=[X], squeeze=0.5),
        SqueezeSubstitute(calibration=[X]),
        SqueezeSubstitute(),
    )
    errors = [substituted(conv, pass_, X)[1] for pass_ in passes]
    assert errors[0] < errors[1] < errors[2]


def test_without_data_the_bias_stays_and_size_does_not_matter() -> None:
    conv = convolution(16, 32, padding=1)
    program = capture(conv, X)
    result = SqueezeSubstitute()(program)
    parameters = dict(result.graph_module.named_parameters())
    assert not parameters["weight_compact_squeeze_bias"].any()
    bias = torch.cat([parameters[f"weight_compact_expand{k}_bias"].detach() for k in (1, 3)])
    torch.testing.assert_close(bias, conv.bias)
    with torch.no_grad():
        lines = [result(X * size) - bias[:, None, None] for size in (1, 100)]
    torch.testing.assert_close(lines[0] * 100, lines[1], rtol=1e-4, atol=1e-3)


def test_expand_alone_has_no_concatenation() -> None:
    result = SqueezeSubstitute(expand=1.0)(capture(convolution(16, 32, padding=1), X))
    assert operators(result) == ["conv2d", "relu", "conv2d"]


def test_a_second_run_changes_nothing() -> None:
    pass_ = SqueezeSubstitute()
    again = pass_(pass_(capture(convolution(16, 32, padding=1), X)))
    assert rewrites(again) == 0
    assert set(reasons(again)) == {"it is part of a substitute already"}


def test_a_share_takes_the_layers_that_lose_least() -> None:
    easy, hard = convolution(32, 32, padding=1), convolution(32, 32, padding=1)
    easy.weight.data[:, 2:] = 0
    program = capture(nn.Sequential(hard, nn.ReLU(), easy), smooth(4, 32, 12, 12))
    result = SqueezeSubstitute(share=0.5)(program)
    assert [layer.layer for layer in result.history[-1].layers] == ["2"]
    assert re.fullmatch(
        r"share 0\.5 is spent on layers that lose less than its 0\.\d+", reasons(result)[0]
    )
    assert rewrites(SqueezeSubstitute(layers=("0",))(program)) == 1
    assert rewrites(SqueezeSubstitute(exclude=("conv2d",))(program)) == 0


def test_all_parts_train() -> None:
    x = smooth(4, 16, 12, 12)
    result = SqueezeSubstitute(calibration=[x])(capture(convolution(16, 32, padding=1), x))
    result(x).square().mean().backward()
    for parameter in result.graph_module.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (convolution(16, 32, 5), "its kernel is 5 x 5, not 3 x 3"),
        (convolution(16, 32, groups=4), "its 4 groups do not mix channels"),
        (
            convolution(16, 16, stride=2),  # squeezed at the input's size
            "its substitute has 1,568 parameters and 550,912 MACs for 2,320 and 460,800",
        ),
    ],
    ids=["kernel", "groups", "cost"],
)
def test_declines(conv: nn.Conv2d, reason: str) -> None:
    result = SqueezeSubstitute(squeeze=1.0)(capture(conv, X))
    assert rewrites(result) == 0
    assert reasons(result) == [reason]


def test_declines_shared_weights_and_takes_nothing_else() -> None:
    conv = convolution(16, 16, padding=1)
    result = SqueezeSubstitute()(capture(nn.Sequential(conv, nn.ReLU(), conv), X))
    assert all(reason.endswith("is shared by 2 layers") for reason in reasons(result))
    assert reasons(result)
    assert rewrites(result) == 0


def test_a_network_without_such_layers_comes_back_with_the_reason() -> None:
    result = SqueezeSubstitute()(
        capture(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.ones(2, 4))
    )
    assert rewrites(result) == 0
    assert result.history[-1].notes == ("no layer to substitute",)


def test_on_a_residual_network() -> None:
    program = network("resnet")
    result = SqueezeSubstitute(calibration=[program.example_inputs[0]])(program)
    record = result.history[-1]
    assert record.layers
    assert record.parameters[1] < record.parameters[0]
    assert record.macs[1] < record.macs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squeeze": 0.0}, "squeeze must be above 0 and at most 1, not 0.0"),
        ({"expand": 1.5}, "expand must be above 0 and at most 1, not 1.5"),
        ({"share": 0.0}, "share must be above 0 and at most 1, not 0.0"),
        ({"rows": 5}, "rows must be at least 64, not 5"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=f"^squeeze-substitute: {re.escape(message)}$"):
        SqueezeSubstitute(**options)


def test_the_module_compiles() -> None:
    x = smooth(1, 16, 12, 12)
    program = SqueezeSubstitute()(capture(convolution(16, 32, padding=1, stride=2), x))
    with torch.no_grad():
        want = program(x).numpy()
    have = np.asarray(go.compile(program, threads=1).session()(x.numpy()))
    # float32 sums of 72 products in another order
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * float(abs(want).max()))


def test_in_a_recipe() -> None:
    recipe = go.Pipeline.from_text(
        "passes: [squeeze-substitute: {squeeze: 0.125, layers: [conv2d]}]",
        calibration=[X],
    )
    (pass_,) = recipe
    assert isinstance(pass_, SqueezeSubstitute)
    assert pass_.calibration == [X]
    assert recipe(capture(convolution(16, 64, padding=1), X)).history[-1].layers[0].text == (
        "fire 8 -> 32 + 32"
    )
