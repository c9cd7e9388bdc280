"""Granules: what is pruned as one. A set of them has as many scores, and masks that remove the chosen ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.passes.prune.weights import Weight
from graphopt.program import Program


class Granules(ABC):
    """The granules of one weight, or of one group of coupled channels; scores and decisions have their ``shape``."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Names them in a message."""

    @property
    @abstractmethod
    def weights(self) -> tuple[Weight, ...]:
        """Whose elements the granules are."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def sizes(self) -> Tensor | int:
        """How many weights a granule holds; a number where all hold as many."""

    @abstractmethod
    def mean(self, elements: Mapping[Weight, Tensor], makers: bool = False) -> Tensor:
        """The mean over each granule of a value given for every element of the weights.

        ``makers``: over the weights that make a channel alone, without those that read it.
        """

    @abstractmethod
    def masks(self, keep: Tensor) -> dict[Weight, Tensor]:
        """1 at the elements of the granules to keep and 0 at the others, in each weight's shape."""

    def pruned(self, program: Program) -> Tensor | None:
        """The granules whose every element is masked already, or None where nothing is."""
        masks = {w: w.old_mask(program) for w in self.weights}
        if all(mask is None for mask in masks.values()):
            return None
        full = {
            w: torch.ones(w.layout.shape) if mask is None else mask for w, mask in masks.items()
        }
        return self.mean(full) == 0

    @property
    def price(self) -> float:
        """What one weight costs in the currency of the budget: 1, or its multiply-accumulates."""
        return 1.0

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """How many weights the granules hold in all."""
        sizes = self.sizes
        return sizes * self.count if isinstance(sizes, int) else int(sizes.sum())


@dataclass(frozen=True, eq=False)
class Decision:
    """One set of granules and which of them stay (True)."""

    granules: Granules
    keep: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Blocks(Granules):
    """Blocks of ``outputs x inputs`` of one weight, at one tap or over all; those at the edges hold what there is."""

    weight: Weight
    outputs: int
    inputs: int
    all_taps: bool = False

    @property
    def label(self) -> str:
        return self.weight.name

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.weight,)

    @property
    def shape(self) -> tuple[int, ...]:
        groups, outputs, inputs, taps = self.weight.layout.sizes
        rows, columns = -(-outputs // self.outputs), -(-inputs // self.inputs)
        return (groups, rows, columns, 1 if self.all_taps else taps)

    @property
    def sizes(self) -> Tensor | int:
        _, outputs, inputs, taps = self.weight.layout.sizes
        deep = taps if self.all_taps else 1
        if outputs % self.outputs == 0 and inputs % self.inputs == 0:
            return self.outputs * self.inputs * deep
        rows = _lengths(outputs, self.outputs)
        columns = _lengths(inputs, self.inputs)
        return (rows[:, None] * columns * deep)[None, :, :, None].expand(self.shape)

    def mean(self, elements: Mapping[Weight, Tensor], makers: bool = False) -> Tensor:
        rows = self.weight.layout.rows(elements[self.weight])
        if self.outputs == self.inputs == 1 and not self.all_taps:
            return rows
        groups, outputs, inputs, taps = rows.shape
        _, high, wide, deep = self.shape
        rows = F.pad(rows, (0, 0, 0, wide * self.inputs - inputs, 0, high * self.outputs - outputs))
        cut = rows.reshape(groups, high, self.outputs, wide, self.inputs, deep, taps // deep)
        return cut.sum(dim=(2, 4, 6)) / self.sizes

    def masks(self, keep: Tensor) -> dict[Weight, Tensor]:
        groups, outputs, inputs, taps = self.weight.layout.sizes
        rows = keep.to(torch.float32)
        if self.outputs > 1:
            rows = rows.repeat_interleave(self.outputs, dim=1)[:, :outputs]
        if self.inputs > 1:
            rows = rows.repeat_interleave(self.inputs, dim=2)[:, :, :inputs]
        mask = self.weight.layout.weight(rows.expand(groups, outputs, inputs, taps))
        return {self.weight: mask}


def _lengths(size: int, step: int) -> Tensor:
    """How much of ``size`` each of the steps covers: ``(10, 4) -> 4, 4, 2``."""
    starts = torch.arange(0, size, step)
    return (size - starts).clamp(max=step)
