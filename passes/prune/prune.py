"""Prune: ``W' = W * M``, or fewer channels. What a weight is worth, how much goes and in which pattern are three choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes.prune.decide import Choices, decide
from graphopt.passes.prune.evidence import LOSSES, Evidence
from graphopt.passes.prune.granularities import Element, Granularity
from graphopt.passes.prune.schedules import Global, Gradual, Schedule
from graphopt.passes.prune.scores import Magnitude, Score
from graphopt.passes.prune.weights import Selection, find
from graphopt.passing import Pass
from graphopt.program import Program
from graphopt.registry import register


@register
@dataclass(frozen=True)
class Prune(Pass):
    """``layer(x, W) -> layer(x, W * M)``, M of zeros and ones; or the layer without some of its channels.

    M is 0 where ``score`` is low, as far as ``schedule`` asks, in the pattern of ``granularity``. For convolutions in 1 to 3 dimensions, transposed ones and linear layers. M is a buffer, so that W trains on and what
    is pruned stays 0 under any optimizer; ``apply-masks`` makes it permanent. A second run moves the masks that are
    there: what is pruned stays so (``monotone``), or may come back with the value it had (``monotone=False``).

    ``layers`` and ``exclude`` name layers by operator or by a glob of node name or module path; ``keep_first`` and
    ``keep_last`` leave out the layers before and behind which there is none; ``min_weights`` the small ones. Scores and
    schedules that measure read ``calibration`` (input batches) or ``data`` (batches of inputs and labels) with ``loss``, a
    name or a function of output and labels. Declines weights that are computed, or read by anything but such layers.

    Raises PassError for choices that contradict each other and CalibrationError where data is missing.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = lossy

    score: Score = field(default_factory=Magnitude)
    schedule: Schedule = field(default_factory=Global)
    granularity: Granularity = field(default_factory=Element)
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_first: bool = False
    keep_last: bool = False
    min_weights: int = 1
    monotone: bool = True
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    data: Iterable[Any] | None = field(default=None, repr=False)
    loss: str | Callable[[Any, Any], Tensor] = "cross-entropy"

    def __post_init__(self) -> None:
        for name, family in (
            ("score", Score),
            ("schedule", Schedule),
            ("granularity", Granularity),
        ):
            if not isinstance(getattr(self, name), family):
                raise PassError(
                    f"prune: {name} must be a {family.__name__}, not {getattr(self, name)!r}"
                )
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise PassError(
                f"prune: loss must be {' or '.join(LOSSES)} or a function, not {self.loss!r}"
            )
        if self.min_weights < 1:
            raise PassError(f"prune: min_weights must be at least 1, not {self.min_weights}")
        self.choices()
        if isinstance(self.schedule, Gradual) and not self.granularity.masks:
            raise PassError(
                f"prune: schedule gradual moves masks, and granularity {self.granularity.name} leaves none; "
                "prune channels in several runs with training between them"
            )

    def choices(self) -> Choices:
        """The choices, the schedule's sparsity settled by the granularity's."""
        schedule = self.schedule.resolved(self.granularity.sparsity())
        return Choices(self.score, schedule, self.granularity, self.monotone)

    def selection(self) -> Selection:
        return Selection(
            self.layers, self.exclude, self.keep_first, self.keep_last, self.min_weights
        )

    def evidence(self, program: Program) -> Evidence:
        return Evidence(program, self.name, self.calibration, self.data, self.loss)

    def apply(self, edit: Edit) -> None:
        evidence = self.evidence(edit.program)
        weights = find(edit.program, self.selection(), edit.decline)
        choices = self.choices()
        decisions = decide(choices, evidence, weights, edit.decline)
        if not decisions:
            edit.note("no layer to prune")
            return
        # A training loop moves masks, it puts in none.
        everywhere = isinstance(self.schedule, Gradual)
        self.granularity.carry_out(edit, decisions, self.monotone, everywhere)
