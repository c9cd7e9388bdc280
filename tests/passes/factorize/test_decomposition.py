"""Chains equal one convolution; the spectrum is LAPACK's."""

import pytest
import torch
from torch.nn import functional as F

from graphopt.passes.factorize.decomposition import Spectrum, Stage, compose, expand
from tests.models import example

CHAINS = {
    "pointwise": [Stage("a", (4, 6, 1, 1), (0, 1)), Stage("b", (5, 4, 1, 1))],
    "rows, columns": [Stage("a", (4, 6, 3, 1), (0,)), Stage("b", (5, 4, 1, 2), (1,))],
    "columns, rows": [Stage("a", (4, 6, 1, 3), (1,)), Stage("b", (5, 4, 2, 1), (0,))],
    "core": [
        Stage("a", (4, 6, 1, 1)),
        Stage("b", (3, 4, 3, 2), (0, 1)),
        Stage("c", (5, 3, 1, 1)),
    ],
    "depthwise": [Stage("a", (12, 1, 3, 2), (0, 1), 6), Stage("b", (5, 12, 1, 1))],
    "grouped last": [
        Stage("a", (10, 6, 1, 1)),
        Stage("b", (10, 1, 3, 1), (0,), 10),
        Stage("c", (5, 2, 1, 2), (1,), 5),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_equals_one_convolution(name):
    stages = CHAINS[name]
    factors = [example(*stage.shape, seed=i).double() for i, stage in enumerate(stages)]
    x = example(2, 6, 7, 8, seed=9).double()
    y = x
    for stage, factor in zip(stages, factors, strict=True):
        y = F.conv2d(y, factor, groups=stage.groups)
    # float64: sums of a few hundred products
    torch.testing.assert_close(F.conv2d(x, compose(stages, factors)), y, atol=1e-10, rtol=1e-10)


def test_a_grouped_weight_is_expanded():
    stage = Stage("a", (6, 2, 3), (0,), 3)
    weight = example(6, 2, 3)
    x = example(1, 6, 9, seed=1)
    torch.testing.assert_close(F.conv1d(x, expand(stage, weight)), F.conv1d(x, weight, groups=3))


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7), (1, 5), (5, 1)])
def test_the_spectrum_is_that_of_lapack(shape):
    matrix = example(*shape).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = Spectrum(matrix)
    torch.testing.assert_close(spectrum.values[: len(s)], s, atol=1e-7, rtol=1e-7)
    for rank in range(1, len(s) + 1):
        left, right = spectrum.factors(rank)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(left @ right, best, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), atol=1e-6, rtol=1e-6)
        lost = float((matrix - best).square().sum())
        assert spectrum.tails()[rank] == pytest.approx(lost, abs=1e-9)


def test_a_matrix_of_zeros_has_finite_factors():
    left, right = Spectrum(torch.zeros(3, 5, dtype=torch.float64)).factors(2)
    assert not (left @ right).any()
    assert left.isfinite().all()
    assert right.isfinite().all()
