"""Distillation as a pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from graphopt.errors import TrainError
from graphopt.passes.recover.fine_tune import FineTune
from graphopt.program import Program
from graphopt.registry import register
from graphopt.train import distill


@register
@dataclass(frozen=True)
class Distill(FineTune):
    """Train the program to answer as ``teacher`` does: ``alpha * L_hard + (1 - alpha) * L_soft + feature_weight * L_features``.

    ``graphopt.distill`` by SGD (Hinton et al. 2015). ``features`` names pairs of nodes or modules, student -> teacher.
    Data needs labels unless alpha is 0. Otherwise as ``fine-tune``.
    """

    name: ClassVar[str] = "distill"

    alpha: float = 0.5
    temperature: float = 4.0
    features: dict[str, str] = field(default_factory=dict)
    feature_weight: float = 1.0
    teacher: Program | nn.Module | None = field(default=None, repr=False)

    def train(self, program: Program) -> Program:
        if self.teacher is None:
            raise TrainError("distill needs teacher=program, the network to learn from")
        return distill(
            program,
            self.teacher,
            self.data,  # type: ignore[arg-type]  # None is refused there
            self.alpha,
            self.temperature,
            features=self.features,
            feature_weight=self.feature_weight,
            **self.keywords(),
        )
