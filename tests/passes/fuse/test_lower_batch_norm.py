from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from tests.models import example, randomize
from tests.passes.helpers import captured, network, operators, reasons, rewrites

X = example(2, 4, 6, 6)


def norm_of_relu(norm: nn.Module, x: torch.Tensor = X) -> go.Program:
    return captured(lambda x, norm: norm(torch.relu(x)), x, norm=randomize(norm))


def test_becomes_a_product_and_a_sum() -> None:
    result = go.passes.LowerBatchNorm()(norm_of_relu(nn.BatchNorm2d(4)))
    assert operators(result) == ["relu", "mul", "add"]
    names = [name for name, _ in result.graph_module.named_parameters()]
    assert names == ["norm.scale", "norm.shift"]
    assert result.graph_module.get_parameter("norm.scale").shape == (4, 1, 1)
    assert rewrites(go.passes.LowerBatchNorm()(result)) == 0


def test_becomes_a_depthwise_convolution() -> None:
    result = go.passes.LowerBatchNorm(form="depthwise")(norm_of_relu(nn.BatchNorm2d(4)))
    assert operators(result) == ["relu", "conv2d"]
    (conv,) = go.Edit(result, "test").nodes("conv2d")
    assert go.ops.bind(conv)["groups"] == 4
    assert rewrites(go.passes.LowerBatchNorm(form="depthwise")(result)) == 0


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (nn.BatchNorm1d(4), example(3, 4)),
        (nn.BatchNorm1d(4), example(3, 4, 5)),
        (nn.BatchNorm3d(4), example(2, 4, 3, 3, 3)),
        (nn.BatchNorm2d(4, affine=False, eps=0.1), X),
        (nn.BatchNorm2d(4), X.double()),
    ],
    ids=["2d", "3d", "5d", "not-affine", "float64"],
)
def test_other_ranks_and_types(norm: nn.Module, x: torch.Tensor) -> None:
    result = go.passes.LowerBatchNorm()(norm_of_relu(norm.to(x.dtype), x))
    assert operators(result) == ["relu", "mul", "add"]


def test_takes_what_folding_leaves() -> None:
    folded = go.passes.FoldBatchNorm()(network("densenet"))
    result = go.passes.LowerBatchNorm()(folded)
    assert "batch_norm" in operators(folded)
    assert "batch_norm" not in operators(result)


def test_declines_training_mode() -> None:
    program = go.capture(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).train(), (X,))
    result = go.passes.LowerBatchNorm()(program)
    assert rewrites(result) == 0
    assert reasons(result) == ["batch norm is in training mode; call program.eval() first"]


def test_depthwise_declines_other_ranks() -> None:
    program = norm_of_relu(nn.BatchNorm1d(4), example(3, 4))
    result = go.passes.LowerBatchNorm(form="depthwise")(program)
    assert reasons(result) == ["a depthwise convolution needs an input of 4 dimensions"]


def test_half_precision_declines_unless_asked_for() -> None:
    program = norm_of_relu(nn.BatchNorm2d(4).half(), X.half())
    assert reasons(go.passes.LowerBatchNorm()(program)) == [
        "half-precision scales round by more than 1e-4; half=True lowers them"
    ]
    assert rewrites(go.passes.LowerBatchNorm(half=True)(program)) == 1


def test_unknown_form_is_refused() -> None:
    with pytest.raises(
        go.errors.PassError,
        match=r"^lower-batch-norm: form must be one of affine, depthwise, not 'x'$",
    ):
        go.passes.LowerBatchNorm(form="x")  # type: ignore[arg-type]  # the mistake


def test_must_run_after_folding() -> None:
    message = (
        "lower-batch-norm must run after fold-batch-norm; "
        "put fold-batch-norm before it in the pipeline"
    )
    with pytest.raises(go.errors.PassError, match=f"^{message}$"):
        go.Pipeline([go.passes.LowerBatchNorm(), go.passes.FoldBatchNorm()])
