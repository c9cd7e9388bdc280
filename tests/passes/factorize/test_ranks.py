"""Ranks: what may be asked for, and that budgets of the whole network are kept at the least error."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import PassError
from graphopt.passes.factorize.ranks import Cost, Rank


@dataclass
class Line:
    """A layer whose cost is linear in its one rank, and whose error falls as the singular values say."""

    squares: list[float]
    slope: int = 10
    whole: int = 50
    signal: int = 2

    @property
    def full(self):
        return (len(self.squares),)

    @property
    def before(self):
        return Cost(self.whole, 7 * self.whole)

    def cost(self, ranks):
        return Cost(self.slope * ranks[0], 7 * self.slope * ranks[0])

    def errors(self, ranks):
        total = sum(self.squares)
        return np.array([sum(self.squares[r:]) / total for (r,) in ranks])

    def signal_ranks(self):
        return (self.signal,)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (16, Rank(fixed=16)),
        ("vbmf", Rank(vbmf=True)),
        ({"energy": 0.9}, Rank(energy=0.9)),
        ({"macs": 0.5, "multiple": 8}, Rank(macs=0.5, multiple=8)),
        ({"parameters": 0.5}, Rank(parameters=0.5)),
    ],
)
def test_spellings(value, expected):
    assert Rank.of(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "half",
            "rank 'half' is none of: a number, vbmf, {energy: 0.9}, {macs: 0.5}, {parameters: 0.5}",
        ),
        (
            True,
            "rank True is none of: a number, vbmf, {energy: 0.9}, {macs: 0.5}, {parameters: 0.5}",
        ),
        (
            {"flops": 0.5},
            "rank {'flops': 0.5} is none of: a number, vbmf, {energy: 0.9}, {macs: 0.5}, {parameters: 0.5}",
        ),
        (0, "fixed of a rank must be a whole number from 1 on, not 0"),
        (
            {"energy": 90},
            "energy of a rank must lie between 0 and 1, not at 90: the share that remains",
        ),
        (
            {"macs": "half"},
            "macs of a rank must lie between 0 and 1, not at 'half': the share that remains",
        ),
        (
            {"macs": 0.5, "energy": 0.9},
            "a rank is chosen by one of fixed, energy, macs, parameters, vbmf; energy and macs are given",
        ),
        (
            {"multiple": 8},
            "a rank is chosen by one of fixed, energy, macs, parameters, vbmf; none is given",
        ),
        (
            {"energy": 0.9, "multiple": -1},
            "multiple of a rank must be a whole number from 0 on, not -1",
        ),
    ],
)
def test_what_does_not_hold_is_an_error(value, message):
    with pytest.raises(PassError) as error:
        Rank.of(value)
    assert str(error.value) == message


def test_a_fixed_rank_is_at_most_the_full_one():
    layers = [Line([4.0, 3.0, 2.0, 1.0]), Line([1.0, 1.0])]
    assert Rank(fixed=3).choose(layers, Cost(100, 700)) == [(3,), (2,)]


def test_a_rank_at_which_cost_grows_has_a_reason():
    line = Line([1.0] * 8)
    for rank, what in ((6, "its MACs would grow from 350 to 420"), (5, None)):
        (choice,) = Rank(fixed=rank).choose([line], Cost(50, 350))
        assert choice == (f"at rank 6 {what}" if what else "rank 5 saves nothing")


def test_energy_takes_the_smallest_rank_that_keeps_it():
    line = Line([8.0, 4.0, 2.0, 1.0, 1.0])
    assert Rank(energy=0.7).choose([line], Cost(50, 350)) == [(2,)]
    assert Rank(energy=0.8).choose([line], Cost(50, 350)) == [(3,)]
    reason = "no rank that keeps 0.99 of its energy costs less than the whole layer"
    assert Rank(energy=0.99).choose([line], Cost(50, 350)) == [reason]


def test_vbmf_is_rounded_and_may_find_nothing():
    lines = [Line([1.0] * 40, slope=1, signal=n) for n in (0, 3, 11, 13)]
    reason = "variational Bayes finds nothing but noise in its weight"
    assert Rank(vbmf=True).choose(lines, Cost(50, 350)) == [reason, (8,), (8,), (16,)]


def test_multiples_follow_the_full_rank():
    def offered(size, **options):
        line = Line([1.0] * size, slope=1, whole=10**6)
        return [r for (r,) in Rank(energy=0.5, **options)._grid(line)]

    assert offered(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert offered(18) == [4, 8, 12, 16, 18]
    assert offered(40) == [8, 16, 24, 32, 40]
    assert offered(70) == [16, 32, 48, 64, 70]
    assert offered(18, multiple=6) == [6, 12, 18]


def test_a_budget_that_cannot_be_reached_has_a_reason():
    lines = [Line([2.0, 1.0, 1.0]), Line([1.0, 1.0])]
    # 100 of the network's 200 parameters are elsewhere, and rank 1 leaves 10 of each 50
    choices = Rank(parameters=0.5).choose(lines, Cost(200, 1400))
    reason = "0.5 of the network's parameters cannot be reached: the layers that can be factored leave 0.6"
    assert choices == [reason, reason]
    assert Rank(parameters=0.6).choose(lines, Cost(200, 1400)) == [(1,), (1,)]


def test_a_budget_takes_from_the_layer_that_loses_least():
    steep, flat = (Line([top, 1.0, 1.0, 1.0], whole=40) for top in (100.0, 1.0))
    choices = Rank(macs=0.7).choose([flat, steep], Cost(80, 560))
    assert choices == ["0.7 of the network's MACs are reached without it", (1,)]


values = st.lists(st.floats(0.01, 10), min_size=2, max_size=5).map(lambda v: sorted(v)[::-1])


@settings(max_examples=100)
@given(st.lists(values, min_size=1, max_size=3), st.floats(0.15, 0.95))
def test_a_budget_is_kept_near_the_least_error(spectra, share):
    lines = [Line(squares) for squares in spectra]
    network = Cost(50 * len(lines), 350 * len(lines))
    options = [[None, *((r,) for r in range(1, len(line.squares) + 1))] for line in lines]

    def total(choice):
        pairs = list(zip(lines, choice, strict=True))
        cost = sum(line.cost(r).macs if r else line.before.macs for line, r in pairs)
        errors = [float(line.errors([r])[0]) if r else 0.0 for line, r in pairs]
        return cost, -sum(math.log(1 - error) for error in errors)

    allowed = share * network.macs
    within = [total(c)[1] for c in itertools.product(*options) if total(c)[0] <= allowed]
    found = Rank(macs=share).choose(lines, network)
    if not within:
        assert all("cannot be reached" in choice for choice in found)
        return
    cost, error = total([None if isinstance(choice, str) else choice for choice in found])
    assert cost <= allowed
    # walking down convex hulls is optimal up to the last step, which is one layer's
    step = max(-math.log(1 - line.errors([(1,)])[0]) for line in lines)
    assert error <= min(within) + step
    for index, line in enumerate(lines):  # and no other rank of one layer is better
        for other in options[index]:
            changed = [None if isinstance(c, str) else c for c in found]
            changed[index] = other
            new_cost, new_error = total(changed)
            assert new_cost > allowed or new_error >= error - 1e-9, line
