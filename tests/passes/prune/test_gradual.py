"""Masks in training: they hold under any optimizer, and move along the cubic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.passes.prune import (
    NM,
    Block,
    Filter,
    Global,
    Gradual,
    GradualPruner,
    PerLayer,
    Prune,
    Taylor,
)
from tests.passes.prune.support import capture, effective, masks, small_cnn, sparsity

GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(4, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 10, (4,), generator=GENERATOR)


def program_of(prune):
    return prune(capture(small_cnn(), 4, 3, 8, 8)).copy()


def train(program, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(program(X), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    ],
)
@pytest.mark.parametrize("granularity", [Block(), NM(), Filter()])
def test_what_is_pruned_stays_zero_under_any_optimizer(make, granularity):
    program = program_of(Prune(schedule=PerLayer(), granularity=granularity))
    before = {name: weight.clone() for name, weight in effective(program).items()}
    zeros = {name: weight == 0 for name, weight in before.items()}
    train(program.train(), make(program.graph_module.parameters()))
    after = effective(program)
    assert all(bool((after[name][zeros[name]] == 0).all()) for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after)


def test_gradients_reach_the_weights_that_are_kept_alone():
    program = program_of(Prune(schedule=PerLayer(0.5)))
    F.cross_entropy(program(X), LABELS).backward()
    for name, mask in masks(program).items():
        weight = program.graph_module.get_parameter(name)
        assert weight.grad is not None
        assert not weight.grad[mask == 0].any()
        assert bool(weight.grad[mask == 1].any())
    assert not any("mask" in name for name, _ in program.graph_module.named_parameters())


def test_the_sparsity_follows_the_cubic():
    prune = Prune(schedule=Gradual(0.8, initial=0.2, start=2, updates=3, every=2))
    program = program_of(prune)
    assert sparsity(masks(program)) == pytest.approx(0.2, abs=1e-3)
    pruner = GradualPruner(prune)
    optimizer = torch.optim.SGD(program.graph_module.parameters(), 0.05, momentum=0.9)
    found = []
    for step in range(10):
        train(program.train(), optimizer, 1)
        asked = pruner.step(program, step)
        found.append(sparsity(masks(program)))
        assert found[-1] == pytest.approx(asked, abs=1e-3)
    steps = [0.2] * 4 + [0.8 - 0.6 * (2 / 3) ** 3] * 2 + [0.8 - 0.6 / 27] * 2 + [0.8] * 2
    assert found == pytest.approx(steps, abs=1e-3)


def test_masks_only_grow_where_that_is_asked():
    options: dict[str, Any] = {"updates": 4, "every": 1, "scope": "per-layer"}
    for monotone in (True, False):
        prune = Prune(schedule=Gradual(0.8, initial=0.4, **options), monotone=monotone)
        program = program_of(prune)
        first = masks(program)
        first = {name: mask.clone() for name, mask in first.items()}
        with torch.no_grad():  # what was pruned is now the largest
            for name, mask in first.items():
                weight = program.graph_module.get_parameter(name)
                weight.copy_(torch.where(mask == 0, 10.0, weight))
        GradualPruner(prune).step(program, 4)
        second = masks(program)
        grew = all(bool((second[name] <= first[name]).all()) for name in first)
        assert grew == monotone
        assert sparsity(second) == pytest.approx(0.8, abs=1e-3)


def test_the_pattern_is_reached_in_the_end():
    prune = Prune(schedule=Gradual(updates=2, every=1), granularity=NM(1, 4), exclude=("0",))
    program = program_of(prune)
    pruner = GradualPruner(prune)
    shares = []
    for step in range(3):
        assert pruner.step(program, step) == pytest.approx((0.0, 0.75 * 7 / 8, 0.75)[step])
        shares.append(sparsity(masks(program)))
    assert shares == pytest.approx([0.0, 0.65625, 0.75], abs=1e-3)


def test_a_score_on_data_leaves_training_alone():
    prune = Prune(Taylor(), Gradual(0.5, updates=1, every=1), data=[(X, LABELS)])
    program = program_of(prune).train()
    F.cross_entropy(program(X), LABELS).backward()
    state = {n: t.clone() for n, t in program.graph_module.state_dict().items() if "mask" not in n}
    grads = [p.grad.clone() for p in program.graph_module.parameters() if p.grad is not None]
    GradualPruner(prune).step(program, 1)
    assert program.training
    assert sparsity(masks(program)) == pytest.approx(0.5, abs=1e-3)
    after = program.graph_module.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)
    held = [p.grad for p in program.graph_module.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, held, strict=True))


def test_the_same_buffers_move():
    prune = Prune(schedule=Gradual(0.5, updates=1, every=1))
    program = program_of(prune)
    before = masks(program)
    GradualPruner(prune).step(program, 1)
    after = masks(program)
    assert all(before[name] is after[name] for name in before)


def test_other_schedules_are_refused():
    with pytest.raises(PassError) as caught:
        GradualPruner(Prune(schedule=Global(0.5)))
    assert str(caught.value) == (
        "gradual pruning needs schedule gradual, not global; pass Prune(schedule=Gradual(...))"
    )


def test_a_program_without_masks_is_refused():
    with pytest.raises(PassError) as caught:
        GradualPruner(Prune(schedule=Gradual(0.5))).step(capture(small_cnn(), 4, 3, 8, 8), 0)
    assert str(caught.value) == (
        "gradual pruning finds no mask in the program; run the Prune pass on it before training"
    )
