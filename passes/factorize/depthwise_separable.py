"""Depthwise separable convolution: a k x l convolution becomes a depthwise one and 1 x 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.arrays import to_numpy
from graphopt.passes.factorize.decomposition import Decomposition, Stage
from graphopt.passes.factorize.factorize import Factorize, Layer
from graphopt.passes.factorize.ranks import Array, Ranks, RankSpec
from graphopt.passes.factorize.vbmf import vbmf_rank
from graphopt.passes.factorize.weighting import Activations
from graphopt.registry import register

_ROUNDS = 4  # of pointwise and depthwise least squares in turn
_STEPS = 12  # of conjugate gradients in each


class _Separable(Decomposition):
    """``W[o, i, t] = sum_m P[o, i, m] D[i, m, t]``: the SVD of each input channel's [out, taps] matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._channels = weight.flatten(2).transpose(0, 1)  # [in, out, taps]
        squares, vectors = torch.linalg.eigh(self._channels.transpose(1, 2) @ self._channels)
        self._squares = squares.flip(1).clamp(min=0)
        self._vectors = vectors.flip(2)  # [in, taps, n], orthonormal

    @property
    def full(self) -> Ranks:
        outputs, _, *taps = self.weight.shape
        return (min(outputs, math.prod(taps)),)

    def stages(self, ranks: Ranks) -> list[Stage]:
        (rank,) = ranks
        outputs, inputs, *taps = self.weight.shape
        ones = (1,) * len(taps)
        return [
            Stage("depthwise", (inputs * rank, 1, *taps), tuple(range(len(taps))), inputs),
            Stage("pointwise", (outputs, inputs * rank, *ones)),
        ]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        (rank,) = ranks
        vectors = self._vectors[:, :, :rank]
        scale = self._squares[:, None, :rank].sqrt().clamp(min=1e-12).sqrt()
        pointwise = (self._channels @ vectors / scale).permute(1, 0, 2)
        depthwise = (vectors * scale).transpose(1, 2)
        made = (depthwise, pointwise)
        return [
            factor.reshape(stage.shape)
            for factor, stage in zip(made, self.stages(ranks), strict=True)
        ]

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        kept = to_numpy(self._squares.sum(dim=0).cumsum(0)) / self.energy
        lost: Array = np.maximum(1 - kept[np.array(ranks)[:, 0] - 1], 0)
        return lost

    def signal_ranks(self) -> Ranks:
        """The mean over input channels."""
        shape = self._channels.shape[1:]
        found = [vbmf_rank(v, *shape) for v in self._squares.sqrt()]
        return (round(float(np.mean(found))),)


def _fit_depthwise(data: Activations, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """The depthwise factor with the least error of the outputs, by conjugate gradients on the normal equations.

    Its unknowns, in * rank * taps, all meet in one system: solving that directly takes its square in memory.
    """
    inputs = data.weight.shape[1]
    rows = data.rows.reshape(len(data.rows), inputs, -1).transpose(0, 1).contiguous()
    solution = depthwise.reshape(inputs, -1, rows.shape[2]).float()
    mixing = pointwise.flatten(1).float()  # [out, in * rank]

    def outputs(factor: Tensor) -> Tensor:
        filtered = rows @ factor.transpose(1, 2)  # [in, rows, rank]
        return filtered.transpose(0, 1).flatten(1) @ mixing.T

    def adjoint(errors: Tensor) -> Tensor:
        mixed = (errors @ mixing).reshape(len(errors), inputs, -1)
        return mixed.permute(1, 2, 0) @ rows

    error = data.outputs - outputs(solution)
    direction = gradient = adjoint(error)
    size = float(gradient.square().sum())
    for _ in range(_STEPS):
        if size == 0.0:
            break
        moved = outputs(direction)
        step = size / float(moved.square().sum().clamp(min=1e-30))
        solution = solution + step * direction
        error = error - step * moved
        gradient = adjoint(error)
        size, before = float(gradient.square().sum()), size
        direction = gradient + size / before * direction
    return solution.double().reshape(depthwise.shape)


@register
@dataclass(frozen=True)
class DepthwiseSeparable(Factorize):
    """Factor a k x l convolution into a depthwise k x l and a 1 x 1 convolution (Howard et al. 2017; Guo et al. 2018).

    ``W[o, i, y, x] ~= sum_m P[o, i, m] D[i, m, y, x]``, ``rank`` filters an input channel (1 is the plain form): the
    truncated SVD of each input channel's [out, k * l] matrix. With ``calibration`` pointwise and depthwise weights are
    fitted to the layer's outputs in turn, by least squares.
    Declines 1 x 1 kernels, groups, weights that are shared, computed, masked or fake-quantized, and ranks at which MACs or
    parameters would grow.
    """

    name: ClassVar[str] = "depthwise-separable"
    operators: ClassVar[tuple[str, ...]] = ("conv1d", "conv2d", "conv2d_same")

    rank: RankSpec = 1

    def unfit(self, layer: Layer) -> str | None:
        if math.prod(layer.weight.shape[2:]) == 1:
            return "a 1 x 1 kernel is pointwise already"
        return super().unfit(layer)

    def decomposed(self, weight: Tensor) -> Decomposition:
        return _Separable(weight)

    def decompose(self, layer: Layer) -> Decomposition:
        return self.decomposed(layer.weight)  # a depthwise factor cannot undo a mixing of channels

    def fit(self, data: Activations, stages: list[Stage], factors: list[Tensor]) -> list[Tensor]:
        for _ in range(_ROUNDS):
            factors = data.fit_last(stages, factors)
            depthwise, pointwise = factors
            factors = [_fit_depthwise(data, depthwise, pointwise), pointwise]
        return data.fit_last(stages, factors)
