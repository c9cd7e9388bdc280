"""``h_kk * w_k**2 / 2``: both estimators of the diagonal against the exact Hessian."""

import functools
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.passes.prune import Block, Obd
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.scores.obd import _gauss_newton, _hessian
from tests.passes.prune.support import capture, linear, scores_of, seeded, weights_of


def exact_diagonals(program, loss):
    """The diagonal of the Hessian of ``loss(output)`` in each weight, by double differentiation."""
    module, (x,) = program.graph_module, program.example_inputs
    found = {}
    for weight in weights_of(program):
        value = weight.tensor(program)

        def of(w, name=weight.name):
            return loss(torch.func.functional_call(module, {name: w}, (x,)))

        matrix = torch.autograd.functional.hessian(of, value).reshape(value.numel(), -1)
        found[weight.name] = matrix.diagonal().reshape(value.shape)
    return found


def all_signs(count):
    """Every pattern of +1 and -1; the mean over them is the expectation."""
    return [torch.tensor(signs) for signs in product((-1.0, 1.0), repeat=count)]


def _shaped(parts, like):
    return next(parts).reshape(like.shape)


def test_by_hand():
    program = capture(linear([[2.0, -1.0, 0.0, 3.0]]), 1, 4)
    x = torch.tensor([[1.0, 2.0, 3.0, -2.0]])
    # L = (w x - t)**2, h_kk = 2 x_k**2; one output of one sample: its sign does not matter
    (scores,) = scores_of(Obd(), program, data=[(x, torch.zeros(1, 1))], loss="mse")
    assert scores.flatten().tolist() == pytest.approx([4.0, 4.0, 0.0, 36.0])
    (block,) = scores_of(Obd(), program, Block(), data=[(x, torch.zeros(1, 1))], loss="mse")
    assert block.flatten().tolist() == pytest.approx([11.0])


def convolutional():
    """ReLU and max pooling: linear in each weight alone. Two samples, three classes."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    )


@pytest.mark.parametrize("labels", [[2, 0], [1, -100]])
def test_gauss_newton_is_the_hessian_of_a_relu_network(labels):
    program = capture(convolutional(), 2, 2, 4, 4)
    labels = torch.tensor(labels)
    exact = exact_diagonals(program, lambda y: F.cross_entropy(y, labels))
    weights = weights_of(program)
    evidence = Evidence(program, "prune")
    totals: dict[Any, Any] = dict.fromkeys(weights, 0.0)
    patterns = all_signs(2 * 3)
    for signs in patterns:
        signs_of = functools.partial(_shaped, iter([signs]))
        found, terms = _gauss_newton(evidence, weights, program.example_inputs, labels, signs_of)
        for weight, values in found.items():
            totals[weight] += values / terms / len(patterns)
    for weight in weights:
        # float32 sums of 64 samples
        torch.testing.assert_close(totals[weight], exact[weight.name], rtol=1e-4, atol=1e-6)


def test_hutchinson_is_the_hessian_of_any_network():
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    program = capture(model, 3, 2)
    target = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    exact = exact_diagonals(program, lambda y: F.mse_loss(y, target))
    weights = weights_of(program)
    evidence = Evidence(program, "prune", loss="mse")
    totals: dict[Any, Any] = dict.fromkeys(weights, 0.0)
    patterns = all_signs(8)
    for pattern in patterns:
        signs_of = functools.partial(_shaped, iter(pattern.split(4)))
        found, _ = _hessian(evidence, weights, program.example_inputs, target, signs_of)
        for weight, values in found.items():
            totals[weight] += values / len(patterns)
    for weight in weights:
        torch.testing.assert_close(totals[weight], exact[weight.name], rtol=1e-4, atol=1e-6)
    assert any(bool((h < 0).any()) for h in exact.values())  # where Gauss-Newton would differ


# What 400 samples leave of noise: the Hessian's off-diagonal entries come and go in the second.
@pytest.mark.parametrize(("curvature", "noise"), [("gauss-newton", 0.25), ("hessian", 0.6)])
def test_many_probes_come_near(curvature, noise):
    program = capture(convolutional(), 2, 2, 4, 4)
    labels = torch.tensor([2, 0])
    exact = exact_diagonals(program, lambda y: F.cross_entropy(y, labels))
    data = [(program.example_inputs[0], labels)]
    scores = scores_of(Obd(curvature, probes=400, seed=1), program, data=data)
    for weight, score in zip(weights_of(program), scores, strict=True):
        expected = exact[weight.name].clamp(min=0) * weight.tensor(program).square() / 2
        found = score.reshape(expected.shape)
        assert float((found - expected).norm()) < noise * float(expected.norm())


def test_negative_curvature_counts_as_none():
    program = capture(nn.Sequential(linear([[1.0]]), nn.Tanh()), 1, 1)
    data = [(torch.ones(1, 1), torch.full((1, 1), -5.0))]
    (scores,) = scores_of(Obd("hessian"), program, data=data, loss=lambda y, t: (y * -t).sum())
    assert scores.flatten().tolist() == [0.0]  # tanh'' < 0 at 1


def test_a_loss_of_ones_own_needs_the_hessian():
    program = capture(linear([[1.0, 2.0]]), 1, 2)
    data = [(torch.ones(1, 2), torch.zeros(1, 1))]
    own: dict[str, Any] = {"data": data, "loss": lambda y, t: ((y - t) ** 2).mean()}
    with pytest.raises(PassError) as caught:
        scores_of(Obd(), program, **own)
    assert str(caught.value) == (
        "prune: score obd knows the curvature of the losses cross-entropy and mse; with a loss of your own "
        "set curvature: hessian"
    )
    (scores,) = scores_of(Obd("hessian", probes=8), program, **own)
    # h = [2, 2] and the off-diagonal 2 v_1 v_2 of eight draws
    assert scores.shape == (1, 1, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"curvature": "fisher"},
            "score obd: curvature must be gauss-newton or hessian, not 'fisher'",
        ),
        ({"probes": 0}, "score obd: probes must be at least 1, not 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(PassError) as caught:
        Obd(**options)
    assert str(caught.value) == message
