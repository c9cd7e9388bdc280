"""N:M: of every m weights along the input channels at most n are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.passes.prune.granularities.granularity import Granularity, decline_weight
from graphopt.passes.prune.granules import Blocks, Granules
from graphopt.passes.prune.weights import Decline, Weight
from graphopt.program import Program


@dataclass(frozen=True)
class NM(Granularity):
    """The best ``n`` of each ``m`` input channels of one output at one tap stay (Zhou et al. 2021); 2:4 unless set.

    The pattern sets the sparsity, ``1 - n / m``: schedules take it from here, and a gradual one arrives there. A last
    group of fewer than m keeps up to n. Declines layers with fewer than m input channels a group.
    """

    name: ClassVar[str] = "n-m"

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PassError(
                f"granularity n-m: n must be at least 1 and less than m, not {self.n} of {self.m}"
            )

    def sparsity(self) -> float | None:
        return 1 - self.n / self.m

    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        found: list[Granules] = []
        for weight in weights:
            inputs = weight.layout.sizes[2]
            if inputs < self.m:
                reason = f"it has {inputs} input channels a group, fewer than m={self.m}"
                decline_weight(decline, weight, reason)
            else:
                found.append(Blocks(weight, 1, 1))
        return found

    def protected(self, granules: Granules, scores: Tensor) -> Tensor | None:
        groups, outputs, inputs, taps = scores.shape
        count = -(-inputs // self.m)
        padded = F.pad(scores, (0, 0, 0, count * self.m - inputs), value=-torch.inf)
        cut = padded.reshape(groups, outputs, count, self.m, taps)
        best = cut.topk(self.n, dim=3).indices
        keep = torch.zeros(cut.shape, dtype=torch.bool).scatter_(3, best, True)
        return keep.reshape(groups, outputs, -1, taps)[:, :, :inputs]
