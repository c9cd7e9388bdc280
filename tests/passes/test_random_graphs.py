"""Float passes on random networks: the input's function, on inputs that nothing was fitted to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt as go
from graphopt.contract import difference
from tests.passes.helpers import operators
from tests.random_graphs import random_model

PASSES: tuple[go.Pass, ...] = (
    go.passes.RemoveIdentities(),
    go.passes.EliminateCommonSubexpressions(),
    go.passes.FoldBatchNorm(),
    go.passes.LowerBatchNorm(form="depthwise"),
    go.passes.FoldConstants(trainable=True),
    go.passes.RemoveDeadCode(),
)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 10**6))
def test_passes_keep_the_function(seed: int) -> None:
    model, x = random_model(seed)
    program = go.capture(model, (x,))
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        assert difference(model(other), program(other)) == 0.0, model.describe()
        result = go.Pipeline(PASSES)(program)
        # two passes promise 1e-5 each; the others are exact
        assert difference(model(other), result(other)) <= 2e-5, model.describe()
    assert not {"dropout", "batch_norm"} & set(operators(result))


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
@pytest.mark.parametrize("seed", range(8))
def test_second_run_rewrites_nothing(pass_: go.Pass, seed: int) -> None:
    model, x = random_model(seed)
    once = pass_(go.capture(model, (x,)))
    assert pass_(once).history[-1].rewrites == 0
