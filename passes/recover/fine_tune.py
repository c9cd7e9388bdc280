"""Fine-tuning as a pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.passes.prune import GradualPruner, Prune
from graphopt.passing import Pass
from graphopt.program import Program
from graphopt.registry import register
from graphopt.train import fine_tune
from graphopt.train.batches import length
from graphopt.train.options import Keywords


@register
@dataclass(frozen=True)
class FineTune(Pass):
    """Train the program on ``data``, batches of (inputs, labels): ``graphopt.fine_tune`` by SGD.

    ``learning_rate`` falls to 0 along a cosine over all steps (epoch by epoch where ``data`` has no length) unless
    ``cosine=False``. ``prune``, of schedule ``gradual``, moves the masks that a ``prune`` pass with the same options has put in;
    a score that needs data reads ``data``. With ``validation`` the best weights are kept. Raises TrainError, naming batch and step.
    """

    name: ClassVar[str] = "fine-tune"
    contract: ClassVar[Contract] = lossy

    epochs: int = 1
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    cosine: bool = True
    clip_norm: float | None = None
    patience: int | None = None
    frozen_statistics: bool = False
    checkpoint: str | None = None
    seed: int = 0
    prune: Prune | None = None
    data: Iterable[Any] | None = field(default=None, repr=False)
    validation: Iterable[Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._pruner()

    def apply(self, edit: Edit) -> None:
        trained = self.train(edit.program)
        record = trained.history[-1]
        edit.program = replace(trained, history=edit.program.history)
        edit.rewrites = record.rewrites
        for note in record.notes:
            edit.note(note)

    def train(self, program: Program) -> Program:
        """The trained program."""
        return fine_tune(program, self.data, **self.keywords())  # type: ignore[arg-type]  # None is refused there

    def keywords(self) -> Keywords:
        """The options of the loop."""
        return {
            "epochs": self.epochs,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler if self.cosine else None,
            "scheduler_every": "epoch" if length(self.data) is None else "step",
            "clip_norm": self.clip_norm,
            "pruner": self._pruner(),
            "patience": self.patience,
            "frozen_statistics": self.frozen_statistics,
            "validation": self.validation,
            "checkpoint": self.checkpoint,
            "seed": self.seed,
        }

    def _pruner(self) -> GradualPruner | None:
        if self.prune is None:
            return None
        data = self.data if self.prune.data is None else self.prune.data
        return GradualPruner(replace(self.prune, data=data))

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.learning_rate, self.momentum, weight_decay=self.weight_decay
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Made from the options alone: a run that goes on with more epochs goes on along their cosine."""
        total = self.epochs * (length(self.data) or 1)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: (1 + math.cos(math.pi * done / total)) / 2
        )
