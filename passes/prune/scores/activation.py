"""Activation: how strongly, or how often, a neuron answers on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Score, Values, distinct


@dataclass(frozen=True)
class Activation(Score):
    """For all weights of output channel c: ``E|a_c|``, or ``1 - APoZ_c``, the share of ``a_c != 0`` (Hu et al. 2016).

    ``a`` is the layer's output behind the batch norm and activation function that alone read it, over all samples and
    positions of ``calibration``.
    """

    name: ClassVar[str] = "activation"

    statistic: Literal["mean-abs", "apoz"] = "mean-abs"

    def __post_init__(self) -> None:
        if self.statistic not in ("mean-abs", "apoz"):
            raise PassError(
                f"score activation: statistic must be mean-abs or apoz, not {self.statistic!r}"
            )

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        weights = distinct(granules)
        watched = {
            _neuron(node).name: (weight, _channel_axis(node))
            for weight in weights
            for node in weight.layers
        }
        totals: dict[object, Tensor | float] = dict.fromkeys(weights, 0.0)
        counts = dict.fromkeys(weights, 0)

        def look(node: fx.Node, value: Any) -> None:
            if node.name in watched:
                weight, axis = watched[node.name]
                rows = value.movedim(axis, 0).flatten(1)
                kept = rows.abs() if self.statistic == "mean-abs" else rows != 0
                totals[weight] = totals[weight] + kept.sum(dim=1, dtype=torch.float64).cpu()
                counts[weight] += rows.shape[1]

        with torch.no_grad():
            for inputs in evidence.inputs():
                evidence.run(inputs, look=look)
        scores = {
            w: w.layout.by_output((torch.as_tensor(totals[w]) / counts[w]).float()) for w in weights
        }
        return [one.mean(scores, makers=True) for one in granules]


def _neuron(layer: fx.Node) -> fx.Node:
    """The value behind the batch norm and activation functions that alone read a layer."""
    value = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        op = ops.info(user)
        if op is None or (op.kind != "activation" and op.name != "batch_norm"):
            break
        value = user
    return value


def _channel_axis(layer: fx.Node) -> int:
    if ops.is_op(layer, "linear"):
        return -1
    weight = ops.bind(layer)["weight"]
    return -(int(weight.meta["val"].dim()) - 1)  # from the end: the batch axis may be missing
