"""How the ranks of all layers are chosen: one strategy, shared by every factorization.

A layer offers each rank at a squared relative error and a cost. A budget is one for the whole network, which keeps the
product of its layers' energies, ``prod (1 - error)``, as large as it can: what best foretells accuracy in Zhang et al.
(2016, 3.3), and what, unlike the sum of errors, forbids to ruin one layer for the sake of the others. Start with every layer
whole and walk, always where ``-log(1 - error)`` grows least for the cost saved, down the lower convex hulls of (cost, loss)
until the network fits. That is the optimum of the Lagrangian, at the multiplier which meets the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import PassError

Ranks: TypeAlias = tuple[int, ...]
RankSpec: TypeAlias = int | str | dict[str, Any]  # as a recipe spells it, and Python alike
Array = npt.NDArray[np.float64]
_MULTIPLES = ((64, 16), (32, 8), (16, 4))  # of a rank, from this full rank on: whole vectors


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a layer or of a network."""

    parameters: int
    macs: int


class Candidate(Protocol):
    """What a layer's decomposition tells of its ranks."""

    @property
    def full(self) -> Ranks:
        """The rank of each mode at which nothing is lost."""

    @property
    def before(self) -> Cost:
        """What the layer costs whole."""

    def cost(self, ranks: Ranks) -> Cost:
        """What it costs at these ranks."""

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        """The squared relative error at each of ``ranks``, smallest first."""

    def signal_ranks(self) -> Ranks:
        """The rank of each mode that variational Bayes tells from noise."""


@dataclass(frozen=True)
class Rank:
    """How ranks are chosen: exactly one of the first five.

    ``fixed``: that rank in every layer. ``energy``: the cheapest rank that keeps this share of a layer's squared norm (of
    its output's, with calibration). ``macs``, ``parameters``: the share of the whole network's that may remain.
    ``vbmf``: what variational Bayes tells from noise. Ranks that are not fixed are multiples of ``multiple``; 0 stands for
    16 in layers of full rank 64 and more, for 8 from 32 on, 4 from 16 on, and 1 below.
    Spelled ``rank: 16``, ``rank: vbmf``, ``rank: {energy: 0.9}``, ``rank: {macs: 0.5, multiple: 8}``.
    """

    fixed: int | None = None
    energy: float | None = None
    macs: float | None = None
    parameters: float | None = None
    vbmf: bool = False
    multiple: int = 0

    def __post_init__(self) -> None:
        given = [n for n in _WAYS if getattr(self, n) is not None and getattr(self, n) is not False]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise PassError(f"a rank is chosen by one of {', '.join(_WAYS)}; {what}")
        for name in ("energy", "macs", "parameters"):
            share = getattr(self, name)
            if share is not None and (isinstance(share, str | bool) or not 0 < share < 1):
                raise PassError(
                    f"{name} of a rank must lie between 0 and 1, not at {share!r}: the share that remains"
                )
        for name, least in (("fixed", 1), ("multiple", 0)):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < least):
                raise PassError(
                    f"{name} of a rank must be a whole number from {least} on, not {count!r}"
                )

    @classmethod
    def of(cls, value: RankSpec) -> Rank:
        """From ``16``, ``"vbmf"`` or ``{"energy": 0.9}``. Raises PassError for anything else."""
        if value == "vbmf":
            return cls(vbmf=True)
        if isinstance(value, dict) and set(value) <= {field.name for field in fields(cls)}:
            return cls(**value)
        if type(value) is int:
            return cls(fixed=value)
        raise PassError(
            f"rank {value!r} is none of: a number, vbmf, {{energy: 0.9}}, {{macs: 0.5}}, {{parameters: 0.5}}"
        )

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> list[Ranks | str]:
        """Each layer's ranks, or the reason why it stays whole. ``network`` is what everything costs now."""
        if self.macs is None and self.parameters is None:
            return [self._alone(candidate) for candidate in candidates]
        return self._budget(candidates, network)

    def _alone(self, candidate: Candidate) -> Ranks | str:
        if self.energy is not None:
            return self._by_energy(candidate, self.energy)
        if self.fixed is not None:
            ranks = tuple(min(self.fixed, full) for full in candidate.full)
        else:
            found = candidate.signal_ranks()
            if not all(found):
                return "variational Bayes finds nothing but noise in its weight"
            ranks = tuple(
                self._rounded(rank, full) for rank, full in zip(found, candidate.full, strict=True)
            )
        return growth(candidate, ranks) or ranks

    def _rounded(self, rank: int, full: int) -> int:
        step = self._step(full)
        return min(full, step * max(1, round(rank / step)))

    def _step(self, full: int) -> int:
        return self.multiple or next((m for least, m in _MULTIPLES if full >= least), 1)

    def _grid(self, candidate: Candidate) -> list[Ranks]:
        """Every choice of multiples, the smallest first."""
        grid: list[Ranks] = [()]
        for full in candidate.full:
            axis = [*range(self._step(full), full, self._step(full)), full]
            grid = [(*ranks, rank) for ranks in grid for rank in axis]
        return grid

    def _smaller(self, candidate: Candidate) -> list[Ranks]:
        return [ranks for ranks in self._grid(candidate) if growth(candidate, ranks) is None]

    def _by_energy(self, candidate: Candidate, energy: float) -> Ranks | str:
        ranks = self._smaller(candidate)
        if ranks:
            errors = candidate.errors(ranks)
            enough = [r for r, error in zip(ranks, errors, strict=True) if error <= 1 - energy]
            if enough:
                return min(enough, key=lambda r: (candidate.cost(r).macs, r))
        return f"no rank that keeps {energy:g} of its energy costs less than the whole layer"

    def _budget(self, candidates: Sequence[Candidate], network: Cost) -> list[Ranks | str]:
        kind = "macs" if self.macs is not None else "parameters"
        share = self.macs if self.macs is not None else self.parameters
        assert share is not None
        label = f"{share:g} of the network's {'MACs' if kind == 'macs' else kind}"
        curves = [_Curve(c, self._smaller(c), kind) for c in candidates]
        spare = share * getattr(network, kind) - getattr(network, kind)
        chosen = _descend(curves, spare)
        if chosen is None:
            least = sum(curve.costs[curve.corners[-1]] - curve.costs[0] for curve in curves)
            reached = 1 + least / getattr(network, kind)
            reason = (
                f"{label} cannot be reached: the layers that can be factored leave {reached:.2g}"
            )
            return [reason for _ in candidates]
        return [
            curve.ranks[index] if index else f"{label} are reached without it"
            for curve, index in zip(curves, chosen, strict=True)
        ]


_WAYS = tuple(field.name for field in fields(Rank) if field.name != "multiple")


def growth(candidate: Candidate, ranks: Ranks) -> str | None:
    """Why factoring at these ranks does not pay, or None: neither count may grow and one must fall."""
    cost, before = candidate.cost(ranks), candidate.before
    for what, now, then in (
        ("MACs", cost.macs, before.macs),
        ("parameters", cost.parameters, before.parameters),
    ):
        if now > then:
            return f"at rank {rank_text(ranks)} its {what} would grow from {then:,} to {now:,}"
    return f"rank {rank_text(ranks)} saves nothing" if cost == before else None


def rank_text(ranks: Ranks) -> str:
    """``32`` or ``32 x 16``."""
    return " x ".join(map(str, ranks))


class _Curve:
    """Loss over cost of one layer; point 0 is the whole layer."""

    def __init__(self, candidate: Candidate, ranks: list[Ranks], kind: str) -> None:
        self.ranks: list[Ranks] = [(), *ranks]
        costs = [getattr(candidate.cost(r), kind) for r in ranks]
        self.costs = np.array([getattr(candidate.before, kind), *costs], dtype=np.float64)
        errors = candidate.errors(ranks) if ranks else np.zeros(0)
        kept = np.maximum(1 - np.concatenate([np.zeros(1), errors]), 1e-9)
        self.losses = -np.log(kept)
        self.corners = [0]
        while True:  # gift wrapping, from the whole layer down
            now = self.corners[-1]
            saved = self.costs[now] - self.costs
            below = np.flatnonzero(saved > 0)
            if not len(below):
                break
            slopes = (self.losses[below] - self.losses[now]) / saved[below]
            ties = below[slopes <= slopes.min() + 1e-15]
            self.corners.append(int(ties[self.costs[ties].argmin()]))

    def slope(self, corner: int) -> float:
        """The loss that the step to ``corner`` brings for each unit of cost that it saves."""
        a, b = self.corners[corner - 1], self.corners[corner]
        return float((self.losses[b] - self.losses[a]) / (self.costs[a] - self.costs[b]))


def _descend(curves: Sequence[_Curve], spare: float) -> list[int] | None:
    """The point of each layer at which the total cost changes by at most ``spare``; None where none does."""
    at = [0] * len(curves)
    steps = [(c.slope(1), i, 1) for i, c in enumerate(curves) if len(c.corners) > 1]
    heapq.heapify(steps)
    moved: list[int] = []
    while spare < 0 and steps:
        _, index, corner = heapq.heappop(steps)
        curve = curves[index]
        new = curve.corners[corner]
        spare += float(curve.costs[at[index]] - curve.costs[new])
        at[index] = new
        moved.append(index)
        if corner + 1 < len(curve.corners):
            heapq.heappush(steps, (curve.slope(corner + 1), index, corner + 1))
    if spare < 0:
        return None
    for index in dict.fromkeys(reversed(moved)):  # the last steps went too far: use what they left
        curve = curves[index]
        fits = np.flatnonzero(curve.costs - curve.costs[at[index]] <= spare)
        best = int(fits[curve.losses[fits].argmin()])
        spare -= float(curve.costs[best] - curve.costs[at[index]])
        at[index] = best
    return at
