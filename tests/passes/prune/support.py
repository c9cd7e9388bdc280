"""Small networks to prune, and what the tests ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granularities import Element, Granularity
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores import Score
from graphopt.passes.prune.scores.score import distinct
from graphopt.passes.prune.weights import Selection, Weight, find


def capture(model: nn.Module, *shape: int, **options: Any) -> go.Program:
    """The program of a model in evaluation mode, on a seeded input."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return go.capture(model.eval(), (x,), **options)


def linear(weight: Sequence[Sequence[float]], bias: bool = False) -> nn.Linear:
    """A linear layer of the given weight (and a bias of zeros)."""
    values = torch.tensor(weight)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=bias)
    layer.weight.data.copy_(values)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def seeded(make: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make()


def small_cnn() -> nn.Sequential:
    """Convolution, batch norm, ReLU, twice; a linear layer: 16 x 3 x 3 x 3, 16 x 16 x 3 x 3 and 10 x 16 weights."""
    model: nn.Sequential = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    )
    return model


def weights_of(program: go.Program) -> list[Weight]:
    """All that can be pruned."""
    return find(program, Selection(), lambda _node, _reason: None)


def scores_of(
    score: Score,
    program: go.Program,
    granularity: Granularity | None = None,
    **evidence: Any,
) -> list[Tensor]:
    """The scores of every set of granules, in the graph's order."""
    granules = granules_of(program, granularity or Element())
    values = {w: w.effective(program).float() for w in distinct(granules)}
    return score.measure(granules, values, Evidence(program, "prune", **evidence))


def granules_of(program: go.Program, granularity: Granularity) -> list[Granules]:
    return granularity.split(program, weights_of(program), lambda _node, _reason: None)


def effective(program: go.Program) -> dict[str, Tensor]:
    """``W * M`` of every layer, by the parameter's name."""
    return {weight.name: weight.effective(program) for weight in weights_of(program)}


def masks(program: go.Program) -> dict[str, Tensor]:
    """The masks there are, by the parameter's name."""
    found = {weight.name: weight.old_mask(program) for weight in weights_of(program)}
    return {name: mask for name, mask in found.items() if mask is not None}


def sparsity(tensors: dict[str, Tensor]) -> float:
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    return zeros / sum(tensor.numel() for tensor in tensors.values())
