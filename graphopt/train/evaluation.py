"""The loss and the score of a program on data, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from graphopt.errors import TrainError
from graphopt.modes import is_training
from graphopt.program import Program, attribute
from graphopt.train import batches
from graphopt.train.objective import Objective, Supervised, score
from graphopt.train.options import Batches, Loss, Metric


@dataclass(frozen=True)
class Evaluation:
    """Means over samples. ``score`` is the metric, else the accuracy of class labels, else None."""

    loss: float
    score: float | None
    samples: int

    @property
    def rank(self) -> float:
        """What is compared: higher is better."""
        return -self.loss if self.score is None else self.score


def evaluate(
    program: Program, data: Batches, loss: Loss = F.cross_entropy, metric: Metric | None = None
) -> Evaluation:
    """``loss(program(inputs), labels)`` and ``metric`` over batches ``(inputs, labels)``; the program is not switched.

    Raises TrainError for a batch that does not fit, and where there is none.
    """
    seen = program.clone().eval() if is_training(program.graph) else program
    return measure(seen, data, Supervised(loss), metric, "evaluate: batch")


def measure(
    program: Program, data: Batches, objective: Objective, metric: Metric | None, label: str
) -> Evaluation:
    """``evaluate`` by any objective, on a program that is in evaluation mode."""
    device = device_of(program)
    total, scored, samples = 0.0, 0.0, 0
    has_score = True
    with torch.no_grad():
        for index, batch in enumerate(data):
            where = f"{label} {index}"
            inputs, labels = batches.to_device(batches.split(batch, where), device)
            batches.check(program, inputs, where)
            result = objective(program, inputs, labels, where)
            count = batches.size(inputs)
            value = score(metric, result.output, labels)
            total += float(result.loss) * count
            has_score = has_score and value is not None
            scored += (value or 0.0) * count
            samples += count
    if not samples:
        raise TrainError(f"{label} 0 is missing: the data holds no batch")
    return Evaluation(total / samples, scored / samples if has_score else None, samples)


def device_of(program: Program) -> torch.device:
    """Where the program's tensors are."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return attribute(program.graph_module, str(node.target)).device
    return torch.device("cpu")


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
