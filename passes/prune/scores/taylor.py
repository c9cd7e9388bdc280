"""Taylor: the first-order change of the loss when a granule becomes zero, ``|sum_i g_i * w_i|``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Score, Values, distinct, gradients


@dataclass(frozen=True)
class Taylor(Score):
    """``E[|mean_i g_i * w_i|]`` over the batches of ``data``, or ``E[(mean_i g_i * w_i)**2]`` (Molchanov et al. 2017, 2019).

    ``g = dL/dw``, ``L`` the mean loss of a batch, the sum over a granule taken before the magnitude: what its weights
    do to the loss together. A smaller batch keeps more of the differences between samples.
    """

    name: ClassVar[str] = "taylor"
    across_layers: ClassVar[Literal["loss", "relative", "as-is"]] = "loss"

    squared: bool = False

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        weights = distinct(granules)
        totals = [torch.zeros(one.shape) for one in granules]
        count = 0
        for inputs, labels in evidence.labelled():
            slopes = gradients(
                evidence,
                weights,
                lambda output, labels=labels: evidence.loss_of(output, labels),  # type: ignore[misc]
                inputs,
            )
            change = {w: slopes[w].float() * values[w] for w in weights}
            for total, one in zip(totals, granules, strict=True):
                mean = one.mean(change)
                total += mean.square() if self.squared else mean.abs()
            count += 1
        return [total / count for total in totals]
