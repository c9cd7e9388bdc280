from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.passes.layer import paths
from tests.models import MODELS, example, randomize
from tests.passes.helpers import captured, network, operators, reasons, rewrites

FOLD = go.passes.FoldBatchNorm()
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def program_of(*layers: nn.Module, x: Tensor | None = None) -> go.Program:
    """A chain of layers, batch norms with random statistics, captured in evaluation mode."""
    x = example(2, 4, 6, 6) if x is None else x
    return go.capture(randomize(nn.Sequential(*layers)).to(x.dtype), (x,))


def check_equals_eager(program: go.Program, result: go.Program, tolerance: float = 2e-6) -> None:
    """Against float64 of the unfolded program: a few float32 roundings of values near 1."""
    x = example(*program.example_inputs[0].shape, seed=7).to(program.example_inputs[0].dtype)
    with torch.no_grad():
        want = program.graph_module.double()(x.double())
        program.graph_module.to(x.dtype)
        torch.testing.assert_close(result(x).double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "bias": False}, {"padding": 1, "stride": 2}])
def test_after_a_convolution(dimensions: int, options: dict[str, Any]) -> None:
    x = example(2, 4, *[5] * dimensions)
    conv = CONVOLUTIONS[dimensions](4, 6, 3, **options)
    program = program_of(conv, NORMS[dimensions](6), x=x)
    result = FOLD(program)
    assert operators(program) == [f"conv{dimensions}d", "batch_norm"]
    assert operators(result) == [f"conv{dimensions}d"]
    assert [name for name, _ in result.graph_module.named_parameters()] == ["0.weight", "0.bias"]
    assert not list(result.graph_module.buffers())
    check_equals_eager(program, result)
    assert rewrites(FOLD(result)) == 0


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"groups": 4, "bias": False}, {"stride": 2, "output_padding": 1}]
)
def test_after_a_transposed_convolution(dimensions: int, options: dict[str, Any]) -> None:
    x = example(2, 4, *[4] * dimensions)
    conv = TRANSPOSED[dimensions](4, 8, 3, **options)
    program = program_of(conv, NORMS[dimensions](8), x=x)
    result = FOLD(program)
    assert operators(result) == [f"conv_transpose{dimensions}d"]
    check_equals_eager(program, result)


@pytest.mark.parametrize("bias", [False, True])
def test_after_a_linear_layer(bias: bool) -> None:
    program = program_of(nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3), x=example(4, 5))
    result = FOLD(program)
    assert operators(result) == ["linear"]
    check_equals_eager(program, result)


@pytest.mark.parametrize("layers", [("conv", "norm"), ("norm", "conv")])
def test_the_layer_keeps_its_module(layers: tuple[str, str]) -> None:
    """Tables name it as the user's model does; globs of ``layers`` find it under the norm's name too."""
    parts: dict[str, nn.Module] = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = nn.Sequential(OrderedDict((name, parts[name]) for name in layers))
    result = FOLD(go.capture(randomize(model), (example(2, 4, 5, 5),)))
    (node,) = (n for n in result.graph.nodes if n.op == "call_function")
    assert paths(node) == ("norm", "conv")
    assert node.meta["provenance"] == ("conv2d", "batch_norm")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_before_a_convolution_without_padding(dimensions: int, groups: int) -> None:
    x = example(2, 4, *[5] * dimensions)
    conv = CONVOLUTIONS[dimensions](4, 8, 3, groups=groups)
    program = program_of(NORMS[dimensions](4), conv, x=x)
    result = FOLD(program)
    assert operators(result) == [f"conv{dimensions}d"]
    check_equals_eager(program, result)


def test_before_a_linear_layer() -> None:
    program = program_of(nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False), x=example(4, 5))
    result = FOLD(program)
    assert operators(result) == ["linear"]
    check_equals_eager(program, result)


def test_before_a_padded_convolution_where_the_shift_is_zero() -> None:
    norm = nn.BatchNorm2d(4)
    randomize(norm)
    assert norm.running_mean is not None
    norm.running_mean.zero_()
    norm.bias.data.zero_()
    conv = nn.Conv2d(4, 3, 3, padding=1)
    program = captured(
        lambda x, norm, conv: conv(norm(x)), example(2, 4, 6, 6), norm=norm, conv=conv
    )
    result = FOLD(program)
    assert operators(result) == ["conv2d"]
    check_equals_eager(program, result)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_eps_and_missing_affine_parameters(affine: bool, eps: float) -> None:
    program = program_of(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, eps=eps, affine=affine))
    result = FOLD(program)
    assert operators(result) == ["conv2d"]
    check_equals_eager(program, result)


def test_norm_before_and_after_one_convolution() -> None:
    program = program_of(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3))
    result = FOLD(program)
    assert operators(result) == ["conv2d"]
    assert rewrites(result) == 2
    check_equals_eager(program, result)


def test_a_pruned_weight_keeps_its_mask_and_name() -> None:
    weight, mask = nn.Parameter(example(3, 4, 1, 1)), (example(3, 4, 1, 1, seed=2) > 0).float()
    norm = randomize(nn.BatchNorm2d(3))
    program = captured(
        lambda x, weight, mask, norm: norm(nn.functional.conv2d(x, weight * mask)),
        example(2, 4, 6, 6), weight=weight, mask=mask, norm=norm,
    )  # fmt: skip
    result = FOLD(program)
    assert operators(result) == ["mul", "conv2d"]
    assert [name for name, _ in result.graph_module.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in result.graph_module.named_buffers()] == ["mask"]
    check_equals_eager(program, result)


def test_float64_is_folded_in_float64() -> None:
    program = program_of(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), x=example(2, 4, 6, 6).double())
    result = FOLD(program)
    assert {p.dtype for p in result.graph_module.parameters()} == {torch.float64}
    check_equals_eager(program, result, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_on_request(dtype: torch.dtype) -> None:
    x = example(2, 4, 6, 6).to(dtype)
    program = program_of(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), x=x)
    declined = FOLD(program)
    assert reasons(declined) == [
        "half-precision weights round by more than 1e-4; half=True folds them"
    ]
    if dtype == torch.float16:
        result = go.passes.FoldBatchNorm(half=True)(program)
        assert operators(result) == ["conv2d"]
        assert result.history[-1].contract == "within(0.01)"


@pytest.mark.parametrize("name", MODELS)
def test_networks(name: str) -> None:
    result = FOLD(network(name))
    left = 1 if name == "densenet" else 0  # the second layer's norm1 reads a concatenation
    assert operators(result).count("batch_norm") == left + (name == "densenet")
    assert rewrites(FOLD(result)) == 0


def test_the_input_program_keeps_its_weights() -> None:
    program = program_of(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    before = program.graph_module.get_parameter("0.weight").clone()
    FOLD(program)
    assert torch.equal(program.graph_module.get_parameter("0.weight"), before)


def test_dynamic_batch() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)))
    result = FOLD(go.capture(model, (example(2, 4, 6, 6),), dynamic_batch=(1, 8)))
    x = example(5, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)


def declined(*inputs: Tensor, function: Any, **parts: Any) -> list[str]:
    for part in parts.values():
        if isinstance(part, nn.Module):
            randomize(part)
    program = captured(function, *inputs, **parts)
    result = FOLD(program)
    assert rewrites(result) == 0
    assert operators(result) == operators(program)
    return reasons(result)


X = example(2, 4, 6, 6)


def conv_and_norm(**options: Any) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4, **options)}


def test_declines_a_convolution_that_is_read_twice() -> None:
    def function(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        y = conv(x)
        result: Tensor = norm(y) + y
        return result

    assert declined(X, function=function, **conv_and_norm()) == ["conv2d is read 2 times"]


def test_declines_a_batch_norm_that_is_read_twice() -> None:
    def function(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        y = norm(x)
        result: Tensor = conv(y) + y
        return result

    assert declined(X, function=function, **conv_and_norm()) == ["batch_norm is read 2 times"]


def test_declines_a_shared_weight() -> None:
    def function(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        result: Tensor = norm(conv(x)) + conv(x + 1)
        return result

    assert declined(X, function=function, **conv_and_norm()) == [
        "parameter conv.weight is shared by 2 layers"
    ]


def test_declines_a_weight_tied_under_another_name() -> None:
    parts: dict[str, nn.Module] = {**conv_and_norm(), "tied": nn.Conv2d(4, 4, 1)}
    parts["tied"].weight = parts["conv"].weight

    def function(x: Tensor, conv: nn.Module, norm: nn.Module, tied: nn.Module) -> Tensor:
        result: Tensor = norm(conv(x)) + tied(x)
        return result

    (reason,) = declined(X, function=function, **parts)
    assert reason == "parameter tied.weight is shared by 2 layers"  # one tensor, one name


def test_declines_a_quantized_weight() -> None:
    def function(x: Tensor, weight: Tensor, norm: nn.Module) -> Tensor:
        quantized = torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -128, 127)
        result: Tensor = norm(nn.functional.conv2d(x, quantized))
        return result

    weight = nn.Parameter(example(4, 4, 1, 1))
    assert declined(X, function=function, weight=weight, norm=nn.BatchNorm2d(4)) == [
        "the weight of conv2d is computed by fake_quantize_per_tensor_affine; fold before quantization"
    ]


def test_declines_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    result = FOLD(go.capture(model, (X,)))
    assert operators(result) == ["conv2d", "batch_norm"]
    assert reasons(result) == ["batch norm is in training mode; call program.eval() first"]


def test_declines_a_norm_without_running_statistics() -> None:
    parts = conv_and_norm(track_running_stats=False)
    assert declined(X, function=lambda x, conv, norm: norm(conv(x)), **parts) == [
        "batch norm keeps no running statistics"
    ]


def test_declines_padding_where_the_norm_shifts() -> None:
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    assert declined(X, function=lambda x, conv, norm: conv(norm(x)), **parts) == [
        "conv2d pads with zeros, where the batch norm has a shift"
    ]


def test_declines_a_linear_layer_whose_norm_is_over_another_axis() -> None:
    parts = {"linear": nn.Linear(6, 5), "norm": nn.BatchNorm1d(4)}
    x = example(2, 4, 6)
    assert declined(x, function=lambda x, linear, norm: norm(linear(x)), **parts) == [
        "dimension 1 of linear is not its output channels"
    ]
    assert declined(x, function=lambda x, linear, norm: linear(norm(x)), **parts) == [
        "dimension 1 of batch_norm is not the input channels of linear"
    ]


def test_declines_a_scale_that_is_not_finite() -> None:
    norm = nn.BatchNorm2d(4)

    def function(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        result: Tensor = norm(conv(x))
        return result

    conv = nn.Conv2d(4, 4, 1)
    assert norm.running_var is not None
    norm.eps = 0.0
    norm.running_var[0] = 0.0
    edit = go.Edit(captured(function, X, conv=conv, norm=norm).clone(), "test")
    FOLD.apply(edit)
    assert [reason for _, reason in edit.declines] == [
        "the scale or shift of the batch norm is not finite"
    ]


def test_leaves_other_layers_before_a_norm() -> None:
    norm = nn.BatchNorm2d(8)
    function = lambda x, norm: norm(torch.cat([x, x.relu()], 1))  # noqa: E731
    assert declined(X, function=function, norm=norm) == []
