"""``GradualPruner``: the masks of a training program, moved step by step."""

from __future__ import annotations

from graphopt.errors import PassError
from graphopt.passes.prune.decide import Choices, decide
from graphopt.passes.prune.masks import masks_of
from graphopt.passes.prune.prune import Prune
from graphopt.passes.prune.schedules import Gradual
from graphopt.passes.prune.weights import find
from graphopt.program import Program


class GradualPruner:
    """Moves masks along ``prune.schedule``, a ``Gradual``; call ``step`` after each step of the optimizer.

        prune = Prune(schedule=Gradual(0.9, updates=50, every=20))
        program = prune(program)                      # masks of the initial sparsity
        pruner = GradualPruner(prune)
        for step, batch in enumerate(batches):
            train(program, batch)
            sparsity = pruner.step(program, step)

    It holds no state but the schedule: a loop that resumes at a step goes on as if it had never stopped.
    """

    def __init__(self, prune: Prune) -> None:
        schedule = prune.choices().schedule
        if not isinstance(schedule, Gradual):
            raise PassError(
                f"gradual pruning needs schedule gradual, not {schedule.name}; "
                "pass Prune(schedule=Gradual(...))"
            )
        self.prune = prune
        self.schedule = schedule

    @property
    def end(self) -> int:
        """The step after which the masks stay as they are."""
        return self.schedule.end

    def step(self, program: Program, step: int) -> float:
        """Move the masks where the schedule is due, in place, from the weights as they are; the sparsity asked for now.

        The masks are the program's own buffers: a program that shares them sees the change, as it sees the training.
        Raises PassError where the program has no masks.
        """
        if self.schedule.due(step):
            self.move(program, step)
        return self.schedule.at(step)

    def move(self, program: Program, step: int) -> None:
        """Set the masks to the sparsity of a training step."""
        prune, choices = self.prune, self.prune.choices()
        weights = [
            w
            for w in find(program, prune.selection(), lambda _node, _reason: None)
            if w.mask is not None
        ]
        if not weights:
            raise PassError(
                "gradual pruning finds no mask in the program; run the Prune pass on it before training"
            )
        at_once = Choices(
            choices.score, self.schedule.one_shot(step), choices.granularity, choices.monotone
        )
        evidence = prune.evidence(program)
        decisions = decide(at_once, evidence, weights, lambda _node, _reason: None)
        for weight, mask in masks_of(decisions, program, choices.monotone).items():
            assert weight.mask is not None
            program.tensor(weight.mask).copy_(mask)
