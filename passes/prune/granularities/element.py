"""Single weights: ``W' = W * M``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.prune.granularities.granularity import Granularity
from graphopt.passes.prune.granules import Blocks, Granules
from graphopt.passes.prune.weights import Decline, Weight
from graphopt.program import Program


@dataclass(frozen=True)
class Element(Granularity):
    """Every weight on its own (unstructured)."""

    name: ClassVar[str] = "element"

    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        return [Blocks(weight, 1, 1) for weight in weights]
