"""``Granularity``: which weights are pruned as one, and what becomes of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from graphopt.choice import Choice
from graphopt.edit import Edit
from graphopt.passes.prune.granules import Decision, Granules
from graphopt.passes.prune.masks import apply_masks
from graphopt.passes.prune.weights import Decline, Weight
from graphopt.program import Program


class Granularity(Choice):
    """A family of frozen dataclasses with a ``name``; a plugin adds its own by deriving from this class.

    ``masks``: the weights keep their shapes and get masks. ``whole_channels``: a granule is all of a channel.
    """

    masks: ClassVar[bool] = True
    whole_channels: ClassVar[bool] = False

    def sparsity(self) -> float | None:
        """The share that the pattern itself prunes (N:M), or None where it is the schedule's choice."""
        return None

    @abstractmethod
    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        """The granules of the weights, a set for each weight or group; ``decline`` is told what cannot be split."""

    def protected(self, granules: Granules, scores: Tensor) -> Tensor | None:
        """The granules that the pattern does not let go, or None."""
        return None

    def settle(self, decisions: list[Decision]) -> list[Decision]:
        """The nearest decisions that can be carried out."""
        return decisions

    def removed(self, decisions: Sequence[Decision]) -> float | None:
        """The share that the decisions remove of what the schedule's sparsity is a share of; None where that is weights."""
        return None

    def carry_out(
        self, edit: Edit, decisions: Sequence[Decision], monotone: bool, everywhere: bool
    ) -> None:
        """Change the program; masks where a granularity does not know better."""
        apply_masks(edit, decisions, monotone, everywhere)


def decline_weight(decline: Decline, weight: Weight, reason: str) -> None:
    for node in weight.layers:
        decline(node, reason)
