"""Prune: ``W' = W * M``, or fewer channels. What a weight is worth, how much goes and in which pattern are three choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes.prune.decide import Choices, decide, masks_of
from graphopt.passes.prune.evidence import LOSSES, Evidence
from graphopt.passes.prune.granularities import Element, Granularity
from graphopt.passes.prune.schedules import Global, Gradual, Schedule
from graphopt.passes.prune.scores import Magnitude, Score
from graphopt.passes.prune.weights import Selection, Weight, find
from graphopt.passing import Pass
from graphopt.program import Program
from graphopt.registry import register


@register
@dataclass(frozen=True)
class Prune(Pass):
    """``layer(x, W) -> layer(x, W * M)``: M is 0 where ``score`` is low, as far as ``schedule`` asks, in the pattern of ``granularity``.

    For convolutions in 1 to 3 dimensions, transposed ones and linear layers. M is a buffer, so that W trains on and what
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
        masks = masks_of(decisions, evidence, self.monotone)
        everywhere = isinstance(self.schedule, Gradual)  # the loop moves masks, it puts in none
        kept = 0
        for weight, mask in masks.items():
            ones = int(torch.count_nonzero(mask))
            set_mask(edit, weight, mask, everywhere or ones < mask.numel())
            kept += ones
        total = sum(mask.numel() for mask in masks.values())
        edit.note(f"{1 - kept / total:.1%} of {total:,} weights in {len(masks)} tensors are masked")


def set_mask(edit: Edit, weight: Weight, mask: Tensor, insert: bool) -> None:
    """Let the weight's readers read ``W * M``; a weight without a mask gets one where ``insert``."""
    before = weight.effective(edit.program)
    old = weight.old_mask(edit.program)
    if old is not None:
        if torch.equal(old, mask):
            return
        assert weight.mask is not None
        edit.set_tensor(weight.mask, mask)
    elif insert:
        _insert(edit, weight, mask)
    else:
        return
    _record(edit, weight, before, weight.tensor(edit.program) * mask)


def _insert(edit: Edit, weight: Weight, mask: Tensor) -> None:
    anchor = weight.sources[0].next
    while anchor.op in ("placeholder", "get_attr"):
        anchor = anchor.next
    build = edit.build(anchor, weight.sources[:1])
    product = build.mul(
        weight.sources[0], build.parameter(f"{weight.name}_mask", mask, trainable=False)
    )
    for source in weight.sources:
        edit.replace(source, product)


def _record(edit: Edit, weight: Weight, before: Tensor, after: Tensor) -> None:
    """A row for each layer that reads the weight: weights and MACs that are not zero."""
    had, has = int(torch.count_nonzero(before)), int(torch.count_nonzero(after))
    size = float(before.float().norm())
    error = float((before - after).float().norm()) / size if size else 0.0
    for node in weight.layers:
        edit.layer_changed(
            node,
            parameters=(had, has),
            macs=(_macs(node, had, before), _macs(node, has, before)),
            error=error,
            text=f"{1 - has / before.numel():.1%} zeros",
        )


def _macs(node: fx.Node, nonzero: int, weight: Tensor) -> int:
    return round(ops.macs(node) * nonzero / weight.numel())
