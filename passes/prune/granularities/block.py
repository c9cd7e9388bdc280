"""Blocks of outputs x inputs at one tap: ``W[a*i : a*(i+1), b*j : b*(j+1), y, x]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import PassError
from graphopt.passes.prune.granularities.granularity import Granularity, decline_weight
from graphopt.passes.prune.granules import Blocks, Granules
from graphopt.passes.prune.weights import Decline, Weight
from graphopt.program import Program


@dataclass(frozen=True)
class Block(Granularity):
    """``outputs x inputs`` weights at one tap are zero together; 1 x 4 is what the sparse int8 kernels multiply at once.

    Blocks are aligned within each group of a grouped convolution. A block at the edge, where the channels are no multiple,
    holds fewer weights. Declines layers with fewer channels a group than a block has: depthwise ones, a first layer of 3.
    """

    name: ClassVar[str] = "block"

    inputs: int = 4
    outputs: int = 1

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise PassError(
                f"granularity block: inputs and outputs must be at least 1, not {self.inputs} and {self.outputs}"
            )

    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        found: list[Granules] = []
        for weight in weights:
            _, outputs, inputs, _ = weight.layout.sizes
            if outputs < self.outputs or inputs < self.inputs:
                decline_weight(
                    decline,
                    weight,
                    f"it has {outputs} x {inputs} channels a group, less than a block of "
                    f"{self.outputs} x {self.inputs}",
                )
            else:
                found.append(Blocks(weight, self.outputs, self.inputs))
        return found
