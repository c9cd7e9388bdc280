"""Who gives how much: the allotment by hand, and on a network whose layers differ."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import CalibrationError, PassError
from graphopt.passes.prune import Element, Prune, Sensitivity
from graphopt.passes.prune.schedules.sensitivity import allot
from tests.passes.prune.support import capture, effective, linear, seeded, sparsity


def test_the_cheaper_layer_gives_first():
    cheap = [(0.0, 0.0), (0.5, 0.1), (1.0, 0.4)]
    dear = [(0.0, 0.0), (0.5, 1.0), (1.0, 3.0)]
    assert allot([cheap, dear], [100, 100], 0.25) == [0.5, 0.0]
    assert allot([cheap, dear], [100, 100], 0.6) == pytest.approx([1.0, 0.2])
    # a weight of the larger layer costs a tenth
    assert allot([dear, dear], [100, 1000], 0.4) == pytest.approx([0.0, 0.44])


def test_a_dent_in_a_curve_is_bridged():
    dented = [(0.0, 0.0), (0.25, 1.0), (0.5, 0.2), (1.0, 4.0)]
    straight = [(0.0, 0.0), (1.0, 1.0)]
    assert allot([dented, straight], [10, 10], 0.25) == pytest.approx([0.5, 0.0])


def test_the_allotment_is_the_optimum():
    """Against every division in steps of a level, on convex curves."""
    generator = torch.Generator().manual_seed(0)
    levels = [0.0, 0.25, 0.5, 0.75, 1.0]
    for _ in range(20):
        steps = [torch.rand(4, generator=generator).sort().values for _ in range(3)]
        curves = [list(zip(levels, [0.0, *s.cumsum(0).tolist()], strict=True)) for s in steps]
        damages = [dict(curve) for curve in curves]
        best = min(
            sum(d[s] for d, s in zip(damages, shares, strict=True))
            for shares in itertools.product(levels, repeat=3)
            if sum(shares) == 1.5
        )
        shares = allot(curves, [8, 8, 8], 0.5)
        assert sum(shares) == pytest.approx(1.5)
        found = sum(_between(curve, share) for curve, share in zip(curves, shares, strict=True))
        assert found <= best + 1e-6


def _between(curve, share):
    for (s0, d0), (s1, d1) in itertools.pairwise(curve):
        if s0 <= share <= s1:
            return d0 + (d1 - d0) * (share - s0) / (s1 - s0)
    raise AssertionError


class Two(nn.Module):
    """One layer whose output is read in full, one whose output hardly counts."""

    def __init__(self):
        super().__init__()
        self.much = seeded(lambda: nn.Linear(8, 8), 1)
        self.little = seeded(lambda: nn.Linear(8, 8), 2)

    def forward(self, x):
        return self.much(x) + 1e-3 * self.little(x)


def test_the_layer_that_hardly_counts_gives_most():
    program = capture(Two(), 4, 8)
    prune = Prune(
        schedule=Sensitivity(0.5, levels=(0.5, 0.9)), calibration=list(program.example_inputs)
    )
    weights = effective(prune(program))
    assert sparsity({"w": weights["little.weight"]}) == pytest.approx(0.9, abs=0.01)
    assert sparsity(weights) == pytest.approx(0.5, abs=0.01)


def test_the_loss_is_asked_where_there_are_labels():
    program = capture(Two(), 4, 8)
    x = program.example_inputs[0]
    with torch.no_grad():
        data = [(x, program(x))]
    options: dict[str, Any] = {"schedule": Sensitivity(0.5, levels=(0.5, 0.9)), "loss": "mse"}
    by_loss = effective(Prune(data=data, **options)(program))
    by_error = effective(Prune(calibration=[x], **options)(program))
    # the squared error of the outputs is the loss here
    assert all(torch.equal(by_loss[name], by_error[name]) for name in by_loss)


def test_a_useless_layer_is_pruned_alone():
    model = nn.Sequential(linear([[1.0, 2.0, 3.0, 4.0]] * 4), linear([[0.0, 0.0, 1.0, 1.0]]))
    prune = Prune(schedule=Sensitivity(0.4, levels=(0.5,)), granularity=Element())
    program = capture(model, 4, 4)
    program = Prune(prune.score, prune.schedule, calibration=list(program.example_inputs))(program)
    assert sparsity({"w": effective(program)["1.weight"]}) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (0.5, 0.2)}, "schedule sensitivity: levels must rise, not [0.5, 0.2]"),
        ({"levels": (0.5, 1.2)}, "schedule sensitivity: levels must be in 0 to 1, not (0.5, 1.2)"),
        (
            {"sparsity": 0.95, "levels": (0.5, 0.9)},
            "schedule sensitivity: a sparsity of 0.95 is above the last of levels, 0.9, beyond which no layer "
            "is pruned",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(PassError) as caught:
        Sensitivity(**options)
    assert str(caught.value) == message


def test_without_data():
    with pytest.raises(CalibrationError, match=r"^prune needs calibration data: "):
        Prune(schedule=Sensitivity())(capture(Two(), 4, 8))
