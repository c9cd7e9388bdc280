"""Gradual pruning: ``s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.schedules.global_ import Global
from graphopt.passes.prune.schedules.per_layer import PerLayer
from graphopt.passes.prune.schedules.schedule import Chooser, Schedule, check_share, settled
from graphopt.passes.prune.scores.score import Values


@dataclass(frozen=True)
class Gradual(Schedule):
    """From ``initial`` to ``sparsity`` in ``updates`` steps of the masks, ``every`` training steps from ``start`` on.

    The cubic of Zhu and Gupta (2017): fast while much is redundant, slow at the end. The pass itself puts masks of the
    initial sparsity into every layer; ``GradualPruner`` moves them in a training loop. ``scope`` is how the sparsity of a
    step is shared out, "global" or "per-layer".
    """

    name: ClassVar[str] = "gradual"

    sparsity: float | None = None
    initial: float = 0.0
    start: int = 0
    updates: int = 100
    every: int = 100
    scope: Literal["global", "per-layer"] = "global"

    def __post_init__(self) -> None:
        check_share(self.name, "sparsity", self.sparsity)
        check_share(self.name, "initial", self.initial)
        if self.start < 0 or self.updates < 1 or self.every < 1:
            raise PassError(
                "schedule gradual: start must be at least 0, updates and every at least 1, not "
                f"{self.start}, {self.updates} and {self.every}"
            )
        if self.scope not in ("global", "per-layer"):
            raise PassError(
                f"schedule gradual: scope must be global or per-layer, not {self.scope!r}"
            )

    @property
    def end(self) -> int:
        """The training step of the last update."""
        return self.start + self.updates * self.every

    def due(self, step: int) -> bool:
        """True at the training steps at which the masks move."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0

    def at(self, step: int) -> float:
        """The sparsity from training step ``step`` on, which changes where ``due``."""
        final = settled(self.sparsity)
        done = min(max((step - self.start) // self.every, 0), self.updates)
        return final + (self.initial - final) * (1 - done / self.updates) ** 3

    def one_shot(self, step: int) -> Schedule:
        """The schedule that prunes to the sparsity of a training step at once."""
        return (Global if self.scope == "global" else PerLayer)(self.at(step))

    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        one_shot = self.one_shot(self.start)
        choose = one_shot.chooser(granules, scores, values, evidence)
        return lambda _share: choose(self.at(self.start))
