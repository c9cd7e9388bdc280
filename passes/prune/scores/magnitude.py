"""Magnitude: ``|w|``; of a granule the mean of ``|w|``, or the root of the mean of ``w**2``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Score, Values


@dataclass(frozen=True)
class Magnitude(Score):
    """``(mean |w|**norm) ** (1 / norm)`` with norm 1 or 2 (Han et al. 2015); of a single weight ``|w|`` in either.

    In the units of the weights, so that a threshold is one on weights.
    """

    name: ClassVar[str] = "magnitude"

    norm: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise PassError(f"score magnitude: norm must be 1 or 2, not {self.norm}")

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        return [self._score(one, values) for one in granules]

    def _score(self, granules: Granules, values: Values) -> Tensor:
        sizes = granules.sizes
        if self.norm == 1 or (isinstance(sizes, int) and sizes == 1):
            return granules.mean({w: values[w].abs() for w in granules.weights})
        return granules.mean({w: values[w].square() for w in granules.weights}).sqrt()
