"""Every decomposition as a function of a weight: full rank loses nothing, and its errors are what its factors lose."""

import pytest
import torch

from graphopt.passes.factorize.decomposition import Decomposition, compose
from tests.models import example
from tests.passes.factorize.layers import PASSES

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "low-rank-linear": [(12, 20), (20, 12), (9, 7, 1, 1)],
    "spatial-svd": [(8, 6, 3, 3), (6, 8, 2, 5)],
    "tucker-conv": [(8, 6, 3, 3), (40, 3, 3, 3), (4, 30, 1, 3), (9, 8, 5)],
    "cp-conv": [(6, 5, 3, 3), (5, 6, 2, 3), (6, 5, 4)],
    "flattened-conv": [(8, 6, 3, 3), (6, 2, 3, 3), (4, 9, 2, 5)],
    "depthwise-separable": [(8, 6, 3, 3), (4, 6, 3, 3), (9, 8, 5)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
FITTED = ("cp-conv", "flattened-conv")


def decompose(name: str, shape: tuple[int, ...]) -> Decomposition:
    return PASSES[name]().decomposed(example(*shape).double())


def lost(decomposition: Decomposition, ranks: tuple[int, ...]) -> float:
    """``||W - W'||^2 / ||W||^2``."""
    whole = compose(decomposition.stages(ranks), decomposition.factors(ranks))
    weight = decomposition.weight
    assert whole.shape == weight.shape
    return float((weight - whole).square().sum() / weight.square().sum())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_full_rank_loses_nothing(name, shape):
    decomposition = decompose(name, shape)
    # exact to float64's Gram matrices; alternating least squares up to its ridge of 1e-4 of the energy
    assert lost(decomposition, decomposition.full) < (2e-2 if name in FITTED else 1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_factors_have_the_shapes_of_their_stages(name, shape):
    decomposition = decompose(name, shape)
    ranks = tuple(min(2, full) for full in decomposition.full)
    shapes = [tuple(factor.shape) for factor in decomposition.factors(ranks)]
    assert shapes == [stage.shape for stage in decomposition.stages(ranks)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_errors_are_what_the_factors_lose(name, shape):
    decomposition = decompose(name, shape)
    first = decomposition.full[0]
    ranks = [(r, *decomposition.full[1:]) for r in sorted({1, (first + 1) // 2, first})]
    errors = decomposition.errors(ranks)
    assert list(errors) == sorted(errors, reverse=True)
    for rank, error in zip(ranks, errors, strict=True):
        if name == "cp-conv":  # an estimate between ranks that are fitted
            assert lost(decomposition, rank) <= error + 0.1
        elif name == "tucker-conv":  # before the refinement, which only gains
            assert error - 0.1 <= lost(decomposition, rank) <= error + 1e-9
        else:
            assert lost(decomposition, rank) == pytest.approx(error, abs=1e-9)


def test_the_truncated_svd_is_the_best():
    """Eckart and Young: no other matrix of that rank is nearer."""
    weight = example(12, 20).double()
    found = lost(PASSES["low-rank-linear"]().decomposed(weight), (5,))
    s = torch.linalg.svdvals(weight)
    assert found == pytest.approx(float(s[5:].square().sum() / s.square().sum()), rel=1e-9)


def test_refinement_gains_on_the_truncated_higher_order_svd():
    decomposition = PASSES["tucker-conv"]().decomposed(example(24, 20, 3, 3).double())
    (start,) = decomposition.errors([(8, 8)])
    assert lost(decomposition, (8, 8)) < start - 0.005


def test_a_mode_of_full_rank_stays_in_the_core():
    decomposition = PASSES["tucker-conv"]().decomposed(example(24, 3, 3, 3).double())
    assert decomposition.full == (24, 3)
    names = {
        r: [stage.name for stage in decomposition.stages(r)] for r in ((8, 3), (24, 2), (8, 2))
    }
    assert names == {
        (8, 3): ["core", "out"],
        (24, 2): ["in", "core"],
        (8, 2): ["in", "core", "out"],
    }
    single = lost(decomposition, (8, 3))
    s = torch.linalg.svdvals(decomposition.weight.flatten(1))
    assert single == pytest.approx(float(s[8:].square().sum() / s.square().sum()), rel=1e-6)


def test_more_restarts_are_no_worse():
    weight = example(10, 12, 3, 3).double()
    errors = [
        lost(PASSES["cp-conv"](restarts=count).decomposed(weight), (6,))  # type: ignore[call-arg]
        for count in (1, 4)
    ]
    assert errors[1] <= errors[0] + 0.01  # the best of 5 sweeps, not of all


def test_cp_without_separable_middle_stages():
    pass_ = PASSES["cp-conv"](separable=False)  # type: ignore[call-arg]
    decomposition = pass_.decomposed(example(10, 12, 3, 3).double())
    assert [stage.name for stage in decomposition.stages((4,))] == ["in", "taps", "out"]
    joint = lost(decomposition, (4,))
    assert joint < lost(PASSES["cp-conv"]().decomposed(decomposition.weight), (4,))


def test_signal_ranks_of_planted_weights():
    noise = 0.02 * example(40, 30, 3, 3, seed=9).double()
    parts = example(40, 5).double(), example(30, 5, seed=1).double(), example(9, 5, seed=2).double()
    weight = torch.einsum("or,ir,tr->oit", *parts).reshape(40, 30, 3, 3) + noise
    assert PASSES["tucker-conv"]().decomposed(weight).signal_ranks() == (5, 5)
    assert PASSES["cp-conv"]().decomposed(weight).signal_ranks() == (5,)
    (separable,) = PASSES["spatial-svd"]().decomposed(weight).signal_ranks()
    assert 5 <= separable <= 15  # each of 5 terms has taps of rank 3
    (pointwise,) = PASSES["low-rank-linear"]().decomposed(weight.flatten(1)).signal_ranks()
    assert pointwise == 5
