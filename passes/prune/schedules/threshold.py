"""A threshold: what scores less is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules.schedule import Chooser, Schedule, check_share, lowest
from graphopt.passes.prune.scores.score import Values


@dataclass(frozen=True)
class Threshold(Schedule):
    """Granules with ``score < value`` are pruned, in every layer at most the share ``most`` of its granules."""

    name: ClassVar[str] = "threshold"

    value: float
    most: float = 0.99

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise PassError(
                f"schedule threshold: value must be at least 0, not {self.value:g}; scores are not negative"
            )
        check_share(self.name, "most", self.most)

    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        kept = [lowest([s], [g], 1.0, self.most)[0] for s, g in zip(scores, granules, strict=True)]
        result = [best | (s >= self.value) for best, s in zip(kept, scores, strict=True)]
        return lambda _share: result
