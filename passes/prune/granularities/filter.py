"""Whole filters, masked: ``W[o, :, :, :] = 0``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.prune.granularities.granularity import Granularity, decline_weight
from graphopt.passes.prune.granules import Blocks, Granules
from graphopt.passes.prune.weights import Decline, Weight
from graphopt.program import Program


@dataclass(frozen=True)
class Filter(Granularity):
    """All weights of one output channel (Li et al. 2017). The shapes stay, and the channel's bias with them.

    ``channel`` removes channels from the network instead. Declines layers of one output.
    """

    name: ClassVar[str] = "filter"
    whole_channels: ClassVar[bool] = True

    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        found: list[Granules] = []
        for weight in weights:
            groups, outputs, inputs, _ = weight.layout.sizes
            if groups * outputs == 1:
                decline_weight(decline, weight, "it has one filter")
            else:
                found.append(Blocks(weight, 1, inputs, all_taps=True))
        return found
