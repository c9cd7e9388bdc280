"""The decision: split the weights into granules, score those, and let the schedule choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granularities import Granularity
from graphopt.passes.prune.granules import Decision, Granules
from graphopt.passes.prune.schedules import Schedule
from graphopt.passes.prune.schedules.schedule import normalized
from graphopt.passes.prune.scores import Score
from graphopt.passes.prune.scores.score import distinct
from graphopt.passes.prune.weights import Decline, Weight

_HALVINGS = 16  # of the share, to meet a budget


@dataclass(frozen=True)
class Choices:
    """The three independent choices, and whether what is pruned stays so."""

    score: Score
    schedule: Schedule
    granularity: Granularity
    monotone: bool = True


def decide(
    choices: Choices, evidence: Evidence, weights: Sequence[Weight], decline: Decline
) -> list[Decision]:
    """Which granules of ``weights`` stay; ``decline`` is told of layers that the score or granularity does not fit.

    Raises PassError for a score that is not a number.
    """
    program = evidence.source
    fit = []
    for weight in weights:
        reason = choices.score.unfit(program, weight)
        if reason is None:
            fit.append(weight)
        else:
            for node in weight.layers:
                decline(node, reason)
    granules = choices.granularity.split(program, fit, decline)
    if not granules:
        return []
    values = {
        w: (w.effective(program) if choices.monotone else w.tensor(program)).float()
        for w in distinct(granules)
    }
    measured = choices.score.measure(granules, values, evidence)
    scores = [
        _bounded(choices, evidence, one, score)
        for one, score in zip(granules, measured, strict=True)
    ]
    choose = choices.schedule.chooser(granules, scores, values, evidence)

    def decisions(share: float) -> list[Decision]:
        rows = zip(granules, choose(share), scores, strict=True)
        return choices.granularity.settle([Decision(*row) for row in rows])

    target = getattr(choices.schedule, "sparsity", None)
    return decisions(0.0) if target is None else _at(target, decisions, choices.granularity)


def _at(
    target: float, decisions: Callable[[float], list[Decision]], granularity: Granularity
) -> list[Decision]:
    """The decisions that remove ``target`` of what the granularity counts: of weights directly, of costs by bisection."""
    found = decisions(target)
    if granularity.removed(found) is None:
        return found
    low, high, best = 0.0, 1.0, decisions(1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = decisions(middle)
        removed = granularity.removed(found)
        assert removed is not None
        if removed < target - 1e-9:
            low = middle
        else:
            high, best = middle, found
    return best


def _bounded(choices: Choices, evidence: Evidence, granules: Granules, score: Tensor) -> Tensor:
    """The score, the lowest of all where a granule is gone already, infinite where the pattern holds it."""
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(score)):
        raise PassError(
            f"{evidence.name}: score {choices.score.name} of {granules.label!r} is NaN or infinite; "
            "check the weights, the data and the loss"
        )
    gone = granules.pruned(evidence.source) if choices.monotone else None
    if gone is not None:
        score = torch.where(gone, -torch.inf, score)
    if choices.schedule.compares and choices.granularity.whole_channels:
        score = _across_layers(choices.score, granules, score)
    protected = choices.granularity.protected(granules, score)
    return score if protected is None else torch.where(protected, torch.inf, score)


def _across_layers(score: Score, granules: Granules, values: Tensor) -> Tensor:
    """Scores of channels as they compare between layers: magnitudes as they are would empty the layers of small weights."""
    if score.across_layers == "loss":
        return values / granules.price
    return normalized(values) if score.across_layers == "relative" else values
