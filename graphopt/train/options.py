"""What every kind of training takes: how long, with what, when to stop, and where to write."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from graphopt.errors import TrainError
from graphopt.program import Program

Batches = Iterable[Any]
Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Any]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]
_EVERY = ("step", "epoch")


class Steps(Protocol):
    """What may change the program while it trains; ``graphopt.passes.GradualPruner`` is one.

    Called after each step of the optimizer, from 0. What it returns (a sparsity) goes into the log. It must change
    tensors in place, as an optimizer does, and depend on nothing but the program and the step. One that has an ``end``, the
    step of its last change, is told of in the history where training ends before.
    """

    def step(self, program: Program, step: int) -> Any: ...


class Keywords(TypedDict, total=False):
    """The options of ``fine_tune`` and ``distill`` by keyword; ``Options`` says what they mean."""

    epochs: int
    steps: int | None
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    scheduler_every: str
    clip_norm: float | None
    pruner: Steps | None
    frozen_statistics: bool
    validation: Batches | None
    metric: Metric | None
    patience: int | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    log: str | os.PathLike[str] | None
    device: str | torch.device | None
    seed: int


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The default optimizer: gentle enough for weights that are nearly right."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@dataclass(frozen=True)
class Options:
    """``optimizer`` and ``scheduler`` are made by the loop: ``lambda parameters: torch.optim.Adam(parameters, lr=1e-3)``.

    Training ends after ``epochs``, or ``steps``, or when ``patience`` epochs have not improved on the ``validation``
    batches; with validation the best weights are kept. ``metric(output, labels)`` is the mean of a batch, higher is
    better; without one it is the accuracy of class labels, or the loss. ``frozen_statistics`` keeps batch norm on its running statistics.
    """

    epochs: int = 1
    steps: int | None = None
    optimizer: MakeOptimizer = momentum
    scheduler: MakeScheduler | None = None
    scheduler_every: str = "epoch"
    clip_norm: float | None = None
    pruner: Steps | None = None
    frozen_statistics: bool = False
    validation: Batches | None = None
    metric: Metric | None = None
    patience: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 100  # steps; the end of an epoch writes one too
    log: str | os.PathLike[str] | None = None
    device: str | torch.device | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise TrainError(f"option {name} must be at least 1, not {getattr(self, name)}")
        for name in ("steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"option {name} must be at least 1 or None, not {value}")
        if self.scheduler_every not in _EVERY:
            raise TrainError(
                f"option scheduler_every must be 'step' or 'epoch', not {self.scheduler_every!r}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise TrainError(f"option clip_norm must be positive or None, not {self.clip_norm}")
        if self.patience is not None and self.validation is None:
            raise TrainError("option patience needs validation=batches to look at")

    def described(self) -> dict[str, Any]:
        """The options as JSON holds them; what has no such form by its type."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def from_keywords(name: str, keywords: Keywords) -> Options:
    """Raises TrainError for an option that does not exist."""
    known = [field.name for field in dataclasses.fields(Options)]
    for key in keywords:
        if key not in known:
            raise TrainError(f"{name} has no option {key!r}; its options: {', '.join(known)}")
    return Options(**keywords)


def check_data(name: str, data: Any, options: Options) -> None:
    """Raise TrainError for what cannot be gone through once an epoch."""
    if data is None:
        raise TrainError(f"{name} needs data: an iterable of batches (inputs, labels)")
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TrainError(
            f"{name} needs data: an iterable of batches (inputs, labels), not a {type(data).__name__}"
        )
    if isinstance(data, Iterator) and (options.epochs > 1 or options.checkpoint is not None):
        raise TrainError(
            f"{name} cannot go through a {type(data).__name__} twice; pass a list or a DataLoader"
        )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return f"<{getattr(value, '__name__', type(value).__name__)}>"
