"""The decision: find the weights, split them into granules, score those, and let the schedule choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granularities import Granularity
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules import Schedule
from graphopt.passes.prune.scores import Score
from graphopt.passes.prune.scores.score import distinct
from graphopt.passes.prune.weights import Decline, Weight


@dataclass(frozen=True)
class Choices:
    """The three independent choices, and whether what is pruned stays so."""

    score: Score
    schedule: Schedule
    granularity: Granularity
    monotone: bool = True


@dataclass(frozen=True, eq=False)
class Decision:
    """One set of granules and which of them stay."""

    granules: Granules
    keep: Tensor


def decide(
    choices: Choices, evidence: Evidence, weights: Sequence[Weight], decline: Decline
) -> list[Decision]:
    """Which granules of ``weights`` stay; ``decline`` is told of layers that the score or granularity does not fit.

    Raises PassError for a score that is not a number.
    """
    program = evidence.program
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
    scores = choices.score.measure(granules, values, evidence)
    bounded = [
        _bounded(choices, evidence, one, score) for one, score in zip(granules, scores, strict=True)
    ]
    kept = choices.schedule.select(granules, bounded, values, evidence)
    return [Decision(one, keep) for one, keep in zip(granules, kept, strict=True)]


def masks_of(
    decisions: Sequence[Decision], evidence: Evidence, monotone: bool
) -> dict[Weight, Tensor]:
    """The mask of each weight, which stays 0 where an older one is if ``monotone``."""
    masks: dict[Weight, Tensor] = {}
    for decision in decisions:
        for weight, mask in decision.granules.masks(decision.keep).items():
            masks[weight] = masks[weight] * mask if weight in masks else mask
    for weight, mask in masks.items():
        old = weight.old_mask(evidence.program)
        new = mask.to(weight.tensor(evidence.program).dtype)
        masks[weight] = new * old if monotone and old is not None else new
    return masks


def _bounded(choices: Choices, evidence: Evidence, granules: Granules, score: Tensor) -> Tensor:
    """The score, the lowest of all where a granule is gone already, infinite where the pattern holds it."""
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(score)):
        raise PassError(
            f"{evidence.name}: score {choices.score.name} of {granules.label!r} is NaN or infinite; "
            "check the weights, the data and the loss"
        )
    gone = granules.pruned(evidence.program) if choices.monotone else None
    if gone is not None:
        score = torch.where(gone, -torch.inf, score)
    protected = choices.granularity.protected(granules, score)
    return score if protected is None else torch.where(protected, torch.inf, score)
