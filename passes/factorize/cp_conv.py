"""CP: a convolution becomes 1 x 1, depthwise k x 1, depthwise 1 x l, 1 x 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.arrays import to_numpy
from graphopt.errors import PassError
from graphopt.passes.factorize import cp
from graphopt.passes.factorize.cp_start import Expansion, noise
from graphopt.passes.factorize.decomposition import Decomposition, Spectrum, Stage, unfold
from graphopt.passes.factorize.factorize import Factorize, Layer
from graphopt.passes.factorize.ranks import Array, Ranks
from graphopt.passes.factorize.vbmf import vbmf_rank
from graphopt.registry import register

_CURVE = 4  # ranks at which the error is fitted for a choice among all
_CURVE_MOST = 512  # the largest of them: the time of a fit grows with the rank's cube
_CURVE_SWEEPS = 5
_TRIAL_SWEEPS = 5
_SWEEPS = 100


class _Polyadic(Decomposition):
    """``W[o, i, t] = sum_r A[o, r] B[i, r] C[t, r]``; with ``separable``, C of 2 axes is an outer product again.

    The error at a rank is known only once it is fitted. A choice among ranks goes by the error of the warm start, known at
    all of them, times what fitting gains, which varies slowly and is measured at a few.
    """

    def __init__(self, weight: Tensor, seed: int, separable: bool, restarts: int) -> None:
        super().__init__(weight)
        self._seed = seed
        self._split = separable and weight.dim() == 4 and min(weight.shape[2:]) > 1
        self._restarts = restarts
        outputs, inputs, *taps = weight.shape
        sizes = taps if self._split else [math.prod(taps), 1]
        self._tensor = weight.reshape(1, outputs, inputs, *sizes).float()
        self._expansion = Expansion(self._tensor)

    @property
    def full(self) -> Ranks:
        """Enough for any weight: the product of all sizes but the largest."""
        sizes = sorted(self._tensor.shape[1:])
        return (math.prod(sizes[:-1]),)

    def stages(self, ranks: Ranks) -> list[Stage]:
        (rank,) = ranks
        outputs, inputs, *taps = self.weight.shape
        ones = (1,) * len(taps)
        middle = [Stage("taps", (rank, 1, *taps), tuple(range(len(taps))), rank)]
        if self._split:
            rows, columns = taps
            middle = [
                Stage("rows", (rank, 1, rows, 1), (0,), rank),
                Stage("columns", (rank, 1, 1, columns), (1,), rank),
            ]
        return [Stage("in", (rank, inputs, *ones)), *middle, Stage("out", (outputs, rank, *ones))]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        (rank,) = ranks
        found = self._fit(rank)
        last, first, rows, columns = (mode[0] for mode in found.modes)
        middle = [rows.T, columns.T] if self._split else [(rows * columns).T]
        return [
            factor.reshape(stage.shape)
            for factor, stage in zip((first.T, *middle, last), self.stages(ranks), strict=True)
        ]

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        wanted = np.array(ranks)[:, 0]
        tails = to_numpy(self._expansion.tails()[0])
        expanded = tails[np.minimum(wanted, len(tails) - 1)]
        most = max(wanted[0], min(wanted[-1], _CURVE_MOST))
        grid = np.unique(np.geomspace(wanted[0], most, _CURVE).round().astype(int))
        fits = [cp.als(self._tensor, self._start(r), _CURVE_SWEEPS) for r in grid.tolist()]
        gains = [
            float(fit.errors) / max(tails[min(r, len(tails) - 1)], 1e-12)
            for r, fit in zip(grid.tolist(), fits, strict=True)
        ]
        gain = np.interp(np.log(wanted), np.log(grid), np.minimum(gains, 1.0))
        errors: Array = np.minimum.accumulate(gain * expanded)
        return errors

    def signal_ranks(self) -> Ranks:
        """The larger of both channel modes' (as Astrid and Lee 2017)."""
        unfoldings = [unfold(self.weight, axis) for axis in (0, 1)]
        return (max(vbmf_rank(Spectrum(m, wide=True).values, *m.shape) for m in unfoldings),)

    def _start(self, rank: int) -> list[Tensor]:
        return self._expansion.start(rank, torch.Generator().manual_seed(self._seed))

    def _fit(self, rank: int) -> cp.Factors:
        """The best of several starts after a few sweeps, refined: SVDs from the outputs, from the inputs, then noise."""
        generator = torch.Generator().manual_seed(self._seed)
        starts = [self._start(rank)]
        if self._restarts > 1:
            a, b, *others = Expansion(self._tensor.transpose(1, 2)).start(rank, generator)
            starts.append([b, a, *others])
        for _ in range(2, self._restarts):
            starts.append(noise(self._tensor, rank, generator))
        together = [torch.cat(modes) for modes in zip(*starts, strict=True)]
        tried = cp.als(self._tensor, together, _TRIAL_SWEEPS)
        best = tried.pick(tried.errors.argmin()[None])
        return cp.als(self._tensor, best.modes, _SWEEPS)


@register
@dataclass(frozen=True)
class CpConv(Factorize):
    """Factor a k x l convolution into 1 x 1, depthwise k x 1, depthwise 1 x l and 1 x 1 (Lebedev et al. 2015).

    ``W[o, i, y, x] ~= sum_r A[o, r] B[i, r] C[y, r] D[x, r]``: canonical polyadic decomposition by alternating least
    squares. It starts from two expansions in singular vectors and ``restarts - 2`` random ones, keeps the best after 5
    sweeps and refines it; a ridge and balanced norms keep components from growing against each other. Without
    ``separable`` the two middle stages are one depthwise k x l convolution: more MACs, one kernel less.
    Declines 1 x 1 kernels, groups, weights that are shared, computed, masked or fake-quantized, and ranks at which MACs or
    parameters would grow.
    """

    name: ClassVar[str] = "cp-conv"
    operators: ClassVar[tuple[str, ...]] = ("conv1d", "conv2d", "conv2d_same")

    separable: bool = True
    restarts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1:
            raise PassError(f"{self.name}: restarts must be at least 1, not {self.restarts}")

    def unfit(self, layer: Layer) -> str | None:
        if math.prod(layer.weight.shape[2:]) == 1:
            return "a 1 x 1 kernel is a matrix; low-rank-linear factors it"
        return super().unfit(layer)

    def decomposed(self, weight: Tensor) -> Decomposition:
        return _Polyadic(weight, self.seed, self.separable, self.restarts)
