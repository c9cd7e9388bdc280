"""The same share of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules.schedule import Chooser, Schedule, check_share, lowest
from graphopt.passes.prune.scores.score import Values


@dataclass(frozen=True)
class PerLayer(Schedule):
    """Every layer loses the granules with the lowest scores that hold the share ``sparsity`` of its weights.

    Rounded to whole granules; a half, or what the granularity fixes, where no sparsity is given.
    """

    name: ClassVar[str] = "per-layer"

    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_share(self.name, "sparsity", self.sparsity)

    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        pairs = list(zip(scores, granules, strict=True))
        return lambda share: [lowest([s], [g], share)[0] for s, g in pairs]
