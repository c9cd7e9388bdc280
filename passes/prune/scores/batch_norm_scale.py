"""Batch-norm scale: ``|gamma|`` of the channel's batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Score, Values, distinct
from graphopt.passes.prune.weights import Weight
from graphopt.program import Program


@dataclass(frozen=True)
class BatchNormScale(Score):
    """``|gamma_c|`` for all weights of output channel c (Liu et al. 2017, network slimming).

    Meant for filters and channels, of a network trained with an L1 penalty on gamma. Declines layers that no batch norm
    with a scale follows: prune before batch norms are folded.
    """

    name: ClassVar[str] = "batch-norm-scale"
    across_layers: ClassVar[Literal["loss", "relative", "as-is"]] = "as-is"

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        scales = {}
        for weight in distinct(granules):  # those that only read pruned channels need no batch norm
            found = [_scale(evidence.program, node) for node in weight.layers]
            gammas = [gamma.float().abs() for gamma in found if gamma is not None]
            if gammas:
                scales[weight] = weight.layout.by_output(torch.stack(gammas).mean(0))
        return [one.mean(scales, makers=True) for one in granules]

    def unfit(self, program: Program, weight: Weight) -> str | None:
        if all(_scale(program, node) is not None for node in weight.layers):
            return None
        return "no batch norm with a scale follows it"


def _scale(program: Program, layer: fx.Node) -> Tensor | None:
    """Gamma of the batch norm that reads the layer. Nodes are found by name: the program may be a copy."""
    for user in layer.users:
        if ops.is_op(user, "batch_norm"):
            arguments = ops.bind(user)
            gamma = arguments["weight"]
            if arguments["input"] is layer and gamma is not None and gamma.op == "get_attr":
                return program.tensor(gamma).detach().cpu()
    return None
