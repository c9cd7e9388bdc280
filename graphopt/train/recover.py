"""``fine_tune`` and ``distill``: a compressed program learns again; a new program comes back, the input is untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Unpack

from torch import nn
from torch.nn import functional as F

from graphopt import driver
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.errors import TrainError
from graphopt.modes import is_training
from graphopt.program import Program
from graphopt.train import checkpoint, rng
from graphopt.train.features import Features
from graphopt.train.loop import Trainer
from graphopt.train.objective import Distillation, Objective, Supervised
from graphopt.train.options import Batches, Keywords, Loss, Options, check_data, from_keywords

Pairs = Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True)
class _Recovery:
    """Training as the driver runs a pass: on a copy, verified, measured, recorded."""

    name: ClassVar[str]
    data: Any = field(repr=False)
    objective: Objective = field(repr=False)
    options: Options = field(repr=False)

    def promised(self) -> Contract:
        return lossy

    def measured(self) -> bool:
        return True

    def apply(self, edit: Edit) -> None:
        before = checkpoint.tensors(edit.program)
        edit.program = edit.program.copy()
        trainer = Trainer(self.name, edit.program, self.data, self.objective, self.options)
        trainer.run()
        after = checkpoint.tensors(edit.program)
        edit.rewrites = sum(not after[name].equal(before[name]) for name in before)
        for line in trainer.notes():
            edit.note(line)

    def run(self, program: Program) -> Program:
        """The trained program; its record holds the options as a person wrote them."""
        check_data(self.name, self.data, self.options)
        result = driver.run(self, program)
        options = {**self.objective.described(), **self.options.described()}
        record = replace(result.history[-1], options=options)
        return replace(result, history=(*result.history[:-1], record))


class _FineTune(_Recovery):
    name = "fine-tune"


class _Distill(_Recovery):
    name = "distill"


def fine_tune(
    program: Program, data: Batches, *, loss: Loss = F.cross_entropy, **options: Unpack[Keywords]
) -> Program:
    """Minimise ``loss(program(inputs), labels)`` over batches ``(inputs, labels)``; returns a new program.

    Masks stay (``W' = W * M`` has no gradient where M is 0), and fake-quantization passes gradients straight through
    within its range. Batch norm and dropout train while the loop does; the result is in the mode that ``program`` was in.
    Inputs are a tensor or a tuple of the program's arguments, of a size that the program takes (``dynamic_batch``).
    ``Options`` has the options. With ``checkpoint=path`` a run that was killed goes on from there when it is called again,
    to the same result; one that had finished returns it.

    Raises TrainError, naming batch and step.
    """
    chosen = from_keywords("fine-tune", options)
    return _FineTune(data, Supervised(loss), chosen).run(program)


def distill(
    student: Program,
    teacher: Program | nn.Module,
    data: Batches,
    alpha: float = 0.5,
    temperature: float = 4.0,
    *,
    features: Pairs = (),
    feature_weight: float = 1.0,
    loss: Loss = F.cross_entropy,
    **options: Unpack[Keywords],
) -> Program:
    """Minimise ``alpha * L_hard + (1 - alpha) * L_soft + feature_weight * L_features``; returns a new program.

    ``L_hard`` is ``loss`` on the labels (none are needed where alpha is 0), ``L_soft = T^2 * KL(teacher || student)`` of
    logits divided by the temperature (Hinton et al. 2015), ``L_features`` the mean squared difference of the values at
    the named nodes, student -> teacher (Romero et al. 2015); a name is a node's or a module's path, which stands for the module's
    output. Where widths differ, a 1 x 1 adapter is trained along and thrown away. Otherwise as ``fine_tune``.
    """
    chosen = from_keywords("distill", options)
    if not 0 <= alpha <= 1:
        raise TrainError(f"distill: alpha must be 0 to 1, not {alpha}")
    if not temperature > 0:
        raise TrainError(f"distill: temperature must be positive, not {temperature}")
    if is_training(teacher.graph) if isinstance(teacher, Program) else teacher.training:
        raise TrainError("distill: the teacher is in training mode; call teacher.eval()")
    pairs = list(features.items() if isinstance(features, Mapping) else features)
    matched = None
    if pairs:
        if not isinstance(teacher, Program):
            raise TrainError(
                "distill: features need a teacher that is a Program; give graphopt.capture(teacher, inputs)"
            )
        with rng.preserved():
            rng.seed_epoch(chosen.seed, 0)
            matched = Features(student, teacher, pairs)
    objective = Distillation(
        _moved(teacher, chosen), alpha, temperature, matched, feature_weight, loss
    )
    return _Distill(data, objective, chosen).run(student)


def _moved(teacher: Program | nn.Module, options: Options) -> Program | nn.Module:
    """The teacher where the training is."""
    if options.device is None:
        return teacher
    if isinstance(teacher, Program):
        moved = teacher.copy()
        moved.graph_module.to(options.device)
        return moved
    return copy.deepcopy(teacher).to(options.device)
