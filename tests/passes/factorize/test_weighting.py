"""Reconstruction on data: whitening, the fit of the last factor, and errors of outputs."""

import pytest
import torch

from graphopt.passes.factorize.decomposition import Stage, compose
from graphopt.passes.factorize.weighting import Activations
from tests.models import example


def correlated(count, size, seed=0):
    return example(count, size, seed=seed) @ example(size, size, seed=seed + 1) + 2.0


def test_unwhitening_undoes_whitening():
    weight = example(5, 6, 3, 3).double()
    data = Activations(correlated(400, 54), weight)
    torch.testing.assert_close(data.unwhiten(data.whiten(weight)), weight, atol=1e-9, rtol=1e-9)


def test_the_norm_of_whitened_weights_is_that_of_outputs():
    weight = example(5, 8).double()
    data = Activations(correlated(2000, 8), weight)
    norm = float(data.whiten(weight).norm()) * 2000**0.5
    assert norm == pytest.approx(float(data.outputs.norm()), rel=2e-2)  # shrunk a little


CHAINS = {
    "linear": [Stage("a", (2, 8)), Stage("b", (6, 2))],
    "rows, columns": [Stage("a", (3, 4, 3, 1), (0,)), Stage("b", (6, 3, 1, 2), (1,))],
    "core": [
        Stage("a", (3, 4, 1, 1)),
        Stage("b", (2, 3, 3, 2), (0, 1)),
        Stage("c", (6, 2, 1, 1)),
    ],
    "grouped last": [
        Stage("a", (12, 4, 1, 1)),
        Stage("b", (12, 1, 3, 1), (0,), 12),
        Stage("c", (6, 2, 1, 2), (1,), 6),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_last_factor_is_the_least_squares_fit(name):
    stages = CHAINS[name]
    factors = [example(*stage.shape, seed=i).double() for i, stage in enumerate(stages)]
    whole = compose(stages, factors)
    weight = whole + 0.3 * example(*whole.shape, seed=7)
    data = Activations(correlated(3000, weight[0].numel()), weight)
    fitted = data.fit_last(stages, factors)
    assert all(torch.equal(a, b) for a, b in zip(fitted[:-1], factors[:-1], strict=True))
    best = data.error(compose(stages, fitted))
    assert best < 0.999 * data.error(whole)
    for seed in range(20):  # no step from the minimum is downhill, but for the ridge of 1e-4
        step = 0.02 * example(*fitted[-1].shape, seed=seed) * fitted[-1].std()
        moved = data.error(compose(stages, [*fitted[:-1], fitted[-1] + step]))
        assert moved > best - 1e-6


def test_the_bias_takes_up_the_mean():
    weight = example(5, 8).double()
    rows = correlated(500, 8)
    data = Activations(rows, weight)
    other = weight + 0.1 * example(5, 8, seed=1)
    gap = rows.double() @ (weight - other).T - data.shift(other)
    assert float(gap.mean(dim=0).abs().max()) < 1e-5  # the mean is rounded to float32
    expected = float(gap.norm() / data.outputs.norm())
    assert data.error(other) == pytest.approx(
        expected, rel=2e-2
    )  # the covariance is shrunk a little


def test_few_rows_leave_the_weights_their_say():
    """14 rows of 64 channels: what the rows do not span is not lost, and the error is not that of the rows alone."""
    weight = example(20, 64).double()
    few = Activations(example(14, 64), weight)
    stages = [Stage("a", (14, 64)), Stage("b", (20, 14))]
    u, s, v = torch.linalg.svd(few.whiten(weight), full_matrices=False)
    factors = [few.unwhiten(v[:14]), u[:, :14] * s[:14]]
    whole = compose(stages, few.fit_last(stages, factors))
    true = float(
        (weight - whole).norm() / weight.norm()
    )  # on inputs of unit covariance, as the rows are
    best = float((s[14:].square().sum() / s.square().sum()).sqrt())
    assert true < 1.5 * best
    assert few.error(whole) == pytest.approx(true, rel=0.5)


def test_constant_inputs_are_allowed():
    weight = example(5, 8).double()
    data = Activations(torch.zeros(10, 8), weight)
    assert data.error(weight) == 0.0
    assert data.unwhiten(data.whiten(weight)).isfinite().all()
