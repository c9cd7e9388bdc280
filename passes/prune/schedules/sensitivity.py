"""Sensitivity: each layer is pruned alone at several sparsities, and the damage measured decides who gives how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules.schedule import Chooser, Schedule, check_share, lowest, settled
from graphopt.passes.prune.scores.score import Values, at_nodes
from graphopt.progress import track

Curve = list[tuple[float, float]]  # (sparsity, damage), rising sparsity from (0, 0) on


@dataclass(frozen=True)
class Sensitivity(Schedule):
    """Minimise ``sum_l damage_l(s_l)`` subject to ``sum_l s_l * n_l = sparsity * sum_l n_l`` (after Han et al. 2015).

    ``damage_l(s)`` is what the loss on ``data`` grows by when layer l alone is pruned to s, or without labels the squared
    error of the outputs on ``calibration`` over their squares. It is measured at ``levels``, made convex from below and
    linear between them; the optimum is then found by taking the cheapest pieces first. No layer goes beyond the last
    level. Takes one run over the data for each layer and level.
    """

    name: ClassVar[str] = "sensitivity"

    sparsity: float | None = None
    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 0.95)

    def __post_init__(self) -> None:
        check_share(self.name, "sparsity", self.sparsity)
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise PassError(f"schedule sensitivity: levels must rise, not {list(self.levels)}")
        if not self.levels[0] > 0 or self.levels[-1] > 1:
            raise PassError(f"schedule sensitivity: levels must be in 0 to 1, not {self.levels}")
        if settled(self.sparsity) > self.levels[-1]:
            raise PassError(
                f"schedule sensitivity: a sparsity of {settled(self.sparsity):g} is above the last of levels, "
                f"{self.levels[-1]:g}, beyond which no layer is pruned"
            )

    def resolved(self, fixed: float | None) -> Sensitivity:
        if fixed is not None:
            raise PassError(
                "prune: the granularity fixes the sparsity of every layer, which schedule sensitivity chooses; "
                "take per-layer, global or gradual"
            )
        return super().resolved(fixed)

    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        damage = _damage(evidence, values)
        curves: list[Curve] = []
        for one, score in track(
            list(zip(granules, scores, strict=True)), f"{evidence.name}: sensitivity", len(scores)
        ):
            keeps = [lowest([score], [one], level)[0] for level in self.levels]
            found = [damage(one, keep) for keep in keeps]
            curves.append([(0.0, 0.0), *zip(self.levels, found, strict=True)])
        sizes = [one.elements for one in granules]

        def choose(share: float) -> list[Tensor]:
            rows = zip(scores, granules, allot(curves, sizes, share), strict=True)
            return [lowest([score], [one], own)[0] for score, one, own in rows]

        return choose


def allot(curves: Sequence[Curve], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each layer at which the damages' sum is least; the curves' lower convex hulls are taken."""
    pieces = []
    for layer, curve in enumerate(curves):
        hull = _lower_hull(curve)
        for (s0, d0), (s1, d1) in pairwise(hull):
            pieces.append(((d1 - d0) / ((s1 - s0) * sizes[layer]), layer, s1 - s0))
    shares = [0.0] * len(curves)
    left = sparsity * sum(sizes)
    for _, layer, width in sorted(pieces):
        taken = min(width, left / sizes[layer])
        shares[layer] += taken
        left -= taken * sizes[layer]
        if left <= 0:
            break
    return shares


def _lower_hull(curve: Curve) -> Curve:
    hull: Curve = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _damage(evidence: Evidence, values: Values) -> Callable[[Granules, Tensor], float]:
    """What masking one set of granules does to the network."""

    def masked(granules: Granules, keep: Tensor) -> dict[Any, Tensor]:
        masks = granules.masks(keep)
        return at_nodes({w: w.on_device(evidence.program, values[w] * masks[w]) for w in masks})

    with torch.no_grad():
        if evidence.data is not None:
            pairs = list(evidence.labelled())

            def loss(replaced: dict[Any, Tensor]) -> float:
                found = [evidence.loss_of(evidence.run(x, replaced), y) for x, y in pairs]
                return sum(float(value) for value in found) / len(found)

            base = loss({})
            return torch.no_grad()(lambda granules, keep: loss(masked(granules, keep)) - base)
        inputs = list(evidence.inputs())
        references = [_outputs(evidence.run(x)) for x in inputs]

    @torch.no_grad()
    def error(granules: Granules, keep: Tensor) -> float:
        replaced = masked(granules, keep)
        wrong = whole = 0.0
        for x, expected in zip(inputs, references, strict=True):
            for y, reference in zip(_outputs(evidence.run(x, replaced)), expected, strict=True):
                wrong += float((y - reference).double().square().sum())
                whole += float(reference.double().square().sum())
        return wrong / whole if whole else wrong

    return error


def _outputs(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
