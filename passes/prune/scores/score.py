"""``Score``: what a granule of weights is worth; the lowest are pruned first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt.choice import Choice
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.weights import Weight
from graphopt.program import Program

Values = Mapping[Weight, Tensor]


class Score(Choice):
    """A family of frozen dataclasses with a ``name``; a plugin adds its own by deriving from this class.

    A granule's score is made of its elements' *mean*, not their sum, so that granules of different sizes, in layers of
    different shapes, compare by what each removed weight costs. ``across_layers`` says how those of whole channels compare
    between layers: "loss", a change of the loss, by what it buys; "relative" to the layer's own; or "as-is".
    """

    across_layers: ClassVar[Literal["loss", "relative", "as-is"]] = "relative"

    @abstractmethod
    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        """A score for every granule, in the shape of its set. ``values`` are the weights to judge, in float32."""

    def unfit(self, program: Program, weight: Weight) -> str | None:
        """Why the score cannot judge a weight, or None."""
        return None


def distinct(granules: Iterable[Granules]) -> list[Weight]:
    """The weights that the granules are made of, each once."""
    return list(dict.fromkeys(weight for one in granules for weight in one.weights))


def gradients(
    evidence: Evidence,
    weights: Sequence[Weight],
    scalar: Callable[[object], Tensor],
    inputs: tuple[object, ...],
) -> dict[Weight, Tensor]:
    """``d scalar(output) / d (W * M)`` of every weight, 0 where the output does not depend on it."""
    leaves = leaves_of(evidence, weights)
    with torch.enable_grad():
        result = scalar(evidence.run(inputs, at_nodes(leaves)))
        found = torch.autograd.grad(result, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {w: (torch.zeros_like(leaf) if g is None else g).cpu() for (w, leaf), g in pairs}


def leaves_of(evidence: Evidence, weights: Sequence[Weight]) -> dict[Weight, Tensor]:
    """``W * M`` of every weight where the program runs, for derivatives."""
    program = evidence.program
    return {w: w.on_device(program, w.effective(program)).clone().requires_grad_() for w in weights}


def at_nodes(values: Values) -> dict[fx.Node, Tensor]:
    """Each weight's value at all the nodes that hold it."""
    return {node: value for weight, value in values.items() for node in weight.values}
