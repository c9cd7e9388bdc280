from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from tests.models import MODELS, example
from tests.passes.helpers import captured, network, operators, rewrites

X = example(2, 4)


def eliminate(program: go.Program) -> go.Program:
    return go.passes.EliminateCommonSubexpressions()(program)


def test_equal_expressions_are_computed_once() -> None:
    program = captured(lambda x: torch.relu(x + 1) * 2 + torch.relu(x + 1), X)
    result = eliminate(program)
    assert operators(program) == ["add", "relu", "mul", "add", "relu", "add"]
    assert operators(result) == ["add", "relu", "mul", "add"]
    assert rewrites(result) == 2


def test_equal_layers_of_one_weight_are_one() -> None:
    layer = nn.Linear(4, 3)
    result = eliminate(captured(lambda x, layer: layer(x) + layer(x), X, layer=layer))
    assert operators(result) == ["linear", "add"]


def test_defaults_written_out_equal_defaults_left_out() -> None:
    aten = torch.ops.aten
    result = eliminate(
        captured(lambda x: aten.add.Tensor(x, x) + aten.add.Tensor(x, x, alpha=1), X)
    )
    assert operators(result) == ["add", "add"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1) * (x + 2),
        lambda x: (x * 1) + (x * 1.0),
        lambda x: (x * 0.0) + (x * -0.0),
        lambda x: torch.dropout(x, 0.5, True) + torch.dropout(x, 0.5, True),
        lambda x: torch.rand_like(x) - torch.rand_like(x),
        lambda x: x.sum(0) + x.sum(1, keepdim=True),
    ],
    ids=["values", "types", "signs-of-zero", "dropout", "random", "keywords"],
)
def test_different_or_random_expressions_stay(function: Callable[[Tensor], Tensor]) -> None:
    edit = go.Edit(captured(function, X).clone(), "test")
    go.passes.EliminateCommonSubexpressions().apply(edit)
    assert edit.rewrites == 0


def test_batch_norm_in_training_mode_stays() -> None:
    norm = nn.BatchNorm1d(4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x) + self.norm(x)
            return result

    program = go.capture(Twice().train(), (X,))
    assert operators(eliminate(program)) == ["batch_norm", "batch_norm", "add"]


def test_second_run_rewrites_nothing() -> None:
    for name in MODELS:
        assert rewrites(eliminate(eliminate(network(name)))) == 0
