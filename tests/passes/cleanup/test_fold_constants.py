from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from tests.models import example
from tests.passes.helpers import captured, operators, reasons, rewrites

X = example(2, 4)
BUFFER = example(4, seed=1)


def test_buffers_and_literals_are_evaluated() -> None:
    program = captured(lambda x, b: x + (b * 2 + torch.arange(4)), X, b=BUFFER)
    result = go.passes.FoldConstants()(program)
    assert operators(result) == ["add"]
    (held,) = result.graph_module.buffers()
    assert torch.equal(held, BUFFER * 2 + torch.arange(4))
    assert not list(result.graph_module.parameters())
    assert rewrites(result) == 1


def test_parts_of_a_tuple_are_folded() -> None:
    def function(x: Tensor, b: Tensor) -> Tensor:
        first, second = b.chunk(2)
        return x[:, :2] * first + second

    result = go.passes.FoldConstants()(captured(function, X, b=BUFFER))
    assert operators(result) == ["slice", "mul", "add"]
    assert rewrites(result) == 2


def test_shape_only_operators_of_an_input_are_constant() -> None:
    program = captured(lambda x: x + x.new_zeros((4,)) + torch.ones_like(x), X)
    result = go.passes.FoldConstants()(program)
    assert operators(result) == ["add", "add"]


def test_a_trainable_weight_and_its_mask_stay() -> None:
    mask = (example(3, 4) > 0).float()
    program = captured(
        lambda x, w, m: nn.functional.linear(x, w * m), X, w=nn.Parameter(example(3, 4)), m=mask
    )
    assert rewrites(go.passes.FoldConstants()(program)) == 0
    folded = go.passes.FoldConstants(trainable=True)(program)
    assert operators(folded) == ["linear"]
    (weight,) = folded.graph_module.parameters()
    assert torch.equal(weight, example(3, 4) * mask)
    assert weight.requires_grad


@pytest.mark.parametrize("trainable", [False, True])
def test_fake_quantization_stays(trainable: bool) -> None:
    program = captured(
        lambda x, w: nn.functional.linear(
            x, torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127)
        ),
        X,
        w=example(3, 4),
    )
    assert rewrites(go.passes.FoldConstants(trainable=trainable)(program)) == 0


def test_random_operators_stay() -> None:
    program = captured(lambda x: x + torch.rand(4), X)
    with torch.random.fork_rng():
        result = go.passes.EliminateCommonSubexpressions()(program)  # no contract to measure
    assert operators(result)[0] == "aten.rand.default"
    edit_only = go.Edit(program.clone(), "test")
    go.passes.FoldConstants().apply(edit_only)
    assert edit_only.rewrites == 0


def test_large_results_of_small_constants_decline() -> None:
    program = captured(lambda x, b: x + b.expand(512, 4), example(512, 4), b=BUFFER)
    result = go.passes.FoldConstants(max_bytes=4096)(program)
    assert operators(result) == ["expand", "add"]
    assert reasons(result) == ["its value takes 8192 bytes, more than max_bytes=4096"]
    assert rewrites(go.passes.FoldConstants()(program)) == 1


def test_sizes_of_a_dynamic_batch_are_no_constants() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.new_ones((x.shape[0], 1))

    program = go.capture(Model(), (X,), dynamic_batch=(1, 8))
    assert rewrites(go.passes.FoldConstants()(program)) == 0


def test_negative_cap_is_refused() -> None:
    with pytest.raises(
        go.errors.PassError, match=r"^fold-constants: max_bytes must be at least 0, not -1$"
    ):
        go.passes.FoldConstants(max_bytes=-1)


def test_second_run_rewrites_nothing() -> None:
    program = captured(lambda x, b: x + (b * 2).reshape(1, 4), X, b=BUFFER)
    assert rewrites(go.passes.FoldConstants()(go.passes.FoldConstants()(program))) == 0
