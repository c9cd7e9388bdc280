"""What is minimised: the loss on labels, or ``alpha * L_hard + (1 - alpha) * L_soft`` with a teacher (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphopt.errors import TrainError
from graphopt.program import Program
from graphopt.train import batches, checkpoint, features
from graphopt.train.options import Loss, Metric
from graphopt.verify import describe


@dataclass(frozen=True)
class Result:
    """One batch: the output, the loss with its gradient, and the terms that it is the sum of."""

    output: Any
    loss: Tensor
    terms: dict[str, float]


class Objective(nn.Module):
    """What a loop minimises; a module, because a teacher's adapters are parameters that train and are saved."""

    def __call__(
        self, program: Program, inputs: tuple[Any, ...], labels: Any, where: str
    ) -> Result:
        """``where`` names the batch in errors."""
        result: Result = super().__call__(program, inputs, labels, where)
        return result

    def described(self) -> dict[str, Any]:
        """What it is, as JSON."""
        raise NotImplementedError


class Supervised(Objective):
    """``loss(program(inputs), labels)``. Raises TrainError where labels are missing or do not fit."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, program: Program, inputs: tuple[Any, ...], labels: Any, where: str) -> Result:
        output = program.graph_module(*inputs)
        return Result(output, hard_loss(self.loss, output, labels, where), {})

    def described(self) -> dict[str, Any]:
        return {"loss": _name(self.loss)}


class Distillation(Objective):
    """``alpha * L_hard + (1 - alpha) * L_soft + feature_weight * L_features``.

    ``L_soft = T^2 * KL(softmax(teacher / T) || softmax(student / T))`` along axis 1, the mean over everything else; T^2
    keeps its gradient's size independent of T. Labels are needed where alpha is not 0.
    """

    def __init__(
        self,
        teacher: Program | nn.Module,
        alpha: float,
        temperature: float,
        matched: features.Features | None,
        feature_weight: float,
        loss: Loss,
    ) -> None:
        super().__init__()
        # a module that is assigned would be one of ours, with its parameters and its mode
        self.teacher = (teacher,)
        self.alpha, self.temperature = alpha, temperature
        self.matched, self.feature_weight = matched, feature_weight
        self.loss = loss

    def forward(self, program: Program, inputs: tuple[Any, ...], labels: Any, where: str) -> Result:
        names = self.matched.student_names if self.matched is not None else []
        output, mine = (
            features.run(program, names, inputs) if names else (program.graph_module(*inputs), [])
        )
        with torch.no_grad():
            taught, theirs = self._teach(inputs, where)
        soft = soft_loss(output, taught, self.temperature, where)
        total, terms = (1 - self.alpha) * soft, {"soft": float(soft.detach())}
        if self.alpha:
            hard = hard_loss(self.loss, output, labels, where)
            total, terms["hard"] = total + self.alpha * hard, float(hard.detach())
        if self.matched is not None:
            matched = self.matched(mine, theirs)
            total, terms["features"] = (
                total + self.feature_weight * matched,
                float(matched.detach()),
            )
        return Result(output, total, terms)

    def described(self) -> dict[str, Any]:
        pairs = self.matched
        return {
            "loss": _name(self.loss),
            "teacher": _fingerprint(self.teacher[0]),
            "alpha": self.alpha,
            "temperature": self.temperature,
            "features": dict(zip(pairs.student_names, pairs.teacher_names, strict=True))
            if pairs
            else {},
            "feature_weight": self.feature_weight,
        }

    def _teach(self, inputs: tuple[Any, ...], where: str) -> tuple[Any, list[Tensor]]:
        (teacher,) = self.teacher
        if not isinstance(teacher, Program):
            return teacher(*inputs), []
        batches.check(teacher, inputs, f"{where}, for the teacher")
        if self.matched is None:
            return teacher.graph_module(*inputs), []
        return features.run(teacher, self.matched.teacher_names, inputs)


def hard_loss(loss: Loss, output: Any, labels: Any, where: str) -> Tensor:
    """``loss(output, labels)``, a scalar."""
    if labels is None:
        raise TrainError(
            f"{where} holds no labels; give batches of (inputs, labels), or learn from a teacher alone: "
            "distill with alpha=0"
        )
    if loss is F.cross_entropy:
        _one_tensor(output, "the program", where, "pass loss=")
    try:
        value = loss(output, labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainError(
            f"{where}: the loss does not take output {_shown(output)} with labels {_shown(labels)}: {reason}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TrainError(f"{where}: the loss must give one number, not {_shown(value)}")
    return value.reshape(())


def soft_loss(output: Any, taught: Any, temperature: float, where: str) -> Tensor:
    """``T^2 * KL(softmax(taught / T) || softmax(output / T))``."""
    student = _one_tensor(output, "the student", where, "wrap it to return its logits")
    teacher = _one_tensor(taught, "the teacher", where, "wrap it to return its logits")
    if student.shape != teacher.shape or student.dim() < 2:
        raise TrainError(
            f"{where}: the student gives {describe(student)} and the teacher {describe(teacher)}; "
            "both must be logits of one shape, classes along axis 1"
        )
    mine = F.log_softmax(student / temperature, 1)
    theirs = F.log_softmax(teacher.to(student.dtype) / temperature, 1)
    divergence = (theirs.exp() * (theirs - mine)).sum(1).mean()
    return temperature**2 * divergence


def accuracy(output: Any, labels: Any) -> float | None:
    """The share of samples whose largest logit, along axis 1, is their label; None where these are no class labels."""
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor) or output.dim() < 2:
        return None
    if labels.is_floating_point() or labels.shape != output.shape[:1] + output.shape[2:]:
        return None
    return float((output.argmax(1) == labels).float().mean())


def score(metric: Metric | None, output: Any, labels: Any) -> float | None:
    """The metric of one batch."""
    values = pytree.tree_map_only(Tensor, Tensor.detach, output)
    if metric is None:
        return accuracy(values, labels)
    return None if labels is None else float(metric(values, labels))


def _fingerprint(teacher: Program | nn.Module) -> str:
    """What tells it from another teacher: a run is not resumed with one."""
    if isinstance(teacher, Program):
        return f"Program {checkpoint.fingerprint(teacher)}"
    return f"{type(teacher).__name__} {checkpoint.digest(teacher.state_dict())}"


def _one_tensor(value: Any, whose: str, where: str, advice: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise TrainError(f"{where}: {whose} returns {_shown(value)}, not one tensor; {advice}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return describe(value)
    return f"a {type(value).__name__}"


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
