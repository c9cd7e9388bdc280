"""Flattened convolution: each filter becomes three one-dimensional ones, over channels, rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.passes.factorize import cp
from graphopt.passes.factorize.cp_start import Expansion, noise
from graphopt.passes.factorize.decomposition import Decomposition, Stage
from graphopt.passes.factorize.factorize import Factorize, Layer
from graphopt.passes.factorize.ranks import Array, Ranks, RankSpec
from graphopt.passes.factorize.vbmf import vbmf_rank
from graphopt.registry import register

_SWEEPS = 40
_RESTARTS = 2  # one from singular vectors, the others random


class _Filters(Decomposition):
    """``W[o, i, y, x] = sum_r A[o, r, i] B[o, r, y] C[o, r, x]``: every filter's own CP, all filters at once.

    A filter [in, k * l] is first rotated into the span of its k * l columns, which changes no error and makes the
    tensors small.
    """

    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__(weight)
        self._seed = seed
        filters = weight.flatten(2)
        basis, small = torch.linalg.qr(filters)  # [out, in, q], [out, q, taps]
        self._basis = basis
        self._tensor = small.reshape(len(weight), 1, -1, *weight.shape[2:])
        self._fits: dict[int, cp.Factors] = {}

    @property
    def full(self) -> Ranks:
        """Enough for any filter: the product of all sizes but the largest."""
        sizes = sorted(self._tensor.shape[2:])
        return (math.prod(sizes[:-1]),)

    def stages(self, ranks: Ranks) -> list[Stage]:
        (rank,) = ranks
        outputs, inputs, rows, columns = self.weight.shape
        lines = rank * outputs
        return [
            Stage("in", (lines, inputs, 1, 1)),
            Stage("rows", (lines, 1, rows, 1), (0,), lines),
            Stage("columns", (outputs, rank, 1, columns), (1,), outputs),
        ]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        scale, inner, rows, columns = self._fit(*ranks).modes  # [out, size, rank]
        channels = self._basis @ inner
        made = (channels.transpose(1, 2), rows.transpose(1, 2), (columns * scale).transpose(1, 2))
        return [
            factor.reshape(stage.shape)
            for factor, stage in zip(made, self.stages(ranks), strict=True)
        ]

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        energies = self._tensor.flatten(1).square().sum(dim=1)
        return np.array([float(self._fit(r).errors @ energies) / self.energy for (r,) in ranks])

    def signal_ranks(self) -> Ranks:
        """The mean over filters of the rank of their [in, k * l] matrices."""
        outputs, inputs, *taps = self.weight.shape
        values = torch.linalg.svdvals(self._tensor.reshape(outputs, -1, math.prod(taps)))
        found = [vbmf_rank(v, inputs, math.prod(taps)) for v in values]
        return (min(self.full[0], round(float(np.mean(found)))),)

    def _fit(self, rank: int) -> cp.Factors:
        if rank not in self._fits:
            generator = torch.Generator().manual_seed(self._seed)
            starts = [Expansion(self._tensor).start(rank, generator)]
            starts += [noise(self._tensor, rank, generator) for _ in range(1, _RESTARTS)]
            fits = [cp.als(self._tensor, start, _SWEEPS) for start in starts]
            best = torch.stack([fit.errors for fit in fits]).argmin(dim=0)
            together = cp.Factors(
                [torch.cat(modes) for modes in zip(*(fit.modes for fit in fits), strict=True)],
                torch.cat([fit.errors for fit in fits]),
            )
            self._fits[rank] = together.pick(best * len(best) + torch.arange(len(best)))
        return self._fits[rank]


@register
@dataclass(frozen=True)
class FlattenedConv(Factorize):
    """Factor every filter into three one-dimensional ones: 1 x 1, then depthwise k x 1 and 1 x l (Jin et al. 2015).

    ``W[o, i, y, x] ~= sum_r A[o, r, i] B[o, r, y] C[o, r, x]``: each filter's own canonical polyadic decomposition of rank
    ``rank`` (1 in the paper), by alternating least squares from its singular vectors and from a random start.
    Declines kernels of one row or column, groups, weights that are shared, computed, masked or fake-quantized, and ranks at
    which MACs or parameters would grow.
    """

    name: ClassVar[str] = "flattened-conv"

    rank: RankSpec = 1

    def unfit(self, layer: Layer) -> str | None:
        rows, columns = layer.weight.shape[2:]
        if min(rows, columns) == 1:
            return f"its kernel is {rows} x {columns}: it is flat already"
        return super().unfit(layer)

    def decomposed(self, weight: Tensor) -> Decomposition:
        return _Filters(weight, self.seed)
