"""One threshold over all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules.schedule import (
    Chooser,
    Schedule,
    check_share,
    lowest,
    normalized,
)
from graphopt.passes.prune.scores.score import Values


@dataclass(frozen=True)
class Global(Schedule):
    """The lowest granules of the whole network that hold the share ``sparsity`` of its weights.

    Scores compare by the weight, since a granule's is a mean over its weights; those of filters and channels as their
    score says (``Score.across_layers``). ``normalize`` divides them by their root mean square in the layer first, for
    scores whose scale differs from layer to layer. No layer loses more than the share ``most`` of its granules: one
    without weights would cut the network (Tanaka et al. 2020).
    """

    name: ClassVar[str] = "global"
    compares: ClassVar[bool] = True

    sparsity: float | None = None
    most: float = 0.99
    normalize: bool = False

    def __post_init__(self) -> None:
        check_share(self.name, "sparsity", self.sparsity)
        check_share(self.name, "most", self.most)

    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        comparable = [normalized(one) for one in scores] if self.normalize else scores
        return lambda share: lowest(comparable, granules, share, self.most)
