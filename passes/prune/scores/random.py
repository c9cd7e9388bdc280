"""A score by chance: the baseline that every other score has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Score, Values


@dataclass(frozen=True)
class Random(Score):
    """Uniform in [0, 1), one draw a granule, from ``seed``: the same program is pruned alike every time."""

    name: ClassVar[str] = "random"
    across_layers: ClassVar[Literal["loss", "relative", "as-is"]] = "as-is"

    seed: int = 0

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.rand(one.shape, generator=generator) for one in granules]
