"""Reconstruction weighted by data: the error of a layer's output on sampled inputs in place of that of its weights.

Rows ``x`` [rows, in * taps] are what output positions read (``passes.patches``), y = W x. Everything is centred: the bias
takes up the mean, ``b' = b + (W - W') E[x]``. Few rows say little about many channels: covariances shrink towards a multiple
of the identity by the share that Ledoit and Wolf (2004) derive from the rows' own scatter, so that a layer seen on a handful of
images keeps what its weights say in all other directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.passes.factorize.decomposition import Stage, compose

_LEAST_SHRINKAGE = 1e-3  # channels that are nearly constant keep their weights
_MOST_SHRINKAGE = 0.999


class Activations:
    """The inputs of one layer on data: whitening, the fit of a chain's last factor, and errors."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        mean = rows.mean(dim=0, dtype=torch.float64)
        self.mean = mean
        self.rows = rows - mean.float()  # float32: 4096 rows of a 512 x 3 x 3 layer are 75 MB
        self.weight = weight
        self.outputs = self.rows @ weight.flatten(1).T.float()
        self._variance = float(self.rows.square().mean())
        self._root, self._shrinkage = self._whitener()

    def whiten(self, weight: Tensor) -> Tensor:
        """``W S`` over the input channels, with ``S S^T`` their shrunk covariance over positions and taps."""
        return torch.einsum("oi...,ij->oj...", weight, self._root)

    def unwhiten(self, factor: Tensor) -> Tensor:
        """``F S^-1``: a factor [rank, in, taps...] that read whitened channels reads the layer's own."""
        moved = factor.movedim(1, -1)
        solved: Tensor = torch.linalg.solve_triangular(
            self._root, moved.reshape(-1, moved.shape[-1]), upper=False, left=False
        )
        return solved.reshape(moved.shape).movedim(-1, 1)

    def fit_last(self, stages: list[Stage], factors: list[Tensor]) -> list[Tensor]:
        """The chain with its last factor replaced by the least squares fit to the layer's outputs.

        A ridge towards the factor as it is decides what few rows leave open.
        """
        *before, last = factors
        features = self._features(stages, before)  # [groups, rows, unknowns]
        start = last.reshape(stages[-1].groups, -1, features.shape[-1]).transpose(1, 2)
        outputs = self.outputs.reshape(len(self.outputs), stages[-1].groups, -1).transpose(0, 1)
        gram = (features.transpose(1, 2) @ features).double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-30)
        ridge = self._shrinkage / (1 - self._shrinkage)
        gram.diagonal(dim1=1, dim2=2).add_(ridge * scale[:, None])
        right = features.transpose(1, 2) @ (outputs - features @ start.float())
        fitted = start + torch.linalg.solve(gram, right.double())
        return [*before, fitted.transpose(1, 2).reshape(last.shape)]

    def error(self, whole: Tensor) -> float:
        """``||W x - W' x|| / ||W x||`` under the shrunk covariance of x, centred."""
        lost = self._energy(
            self.outputs - self.rows @ whole.flatten(1).T.float(), self.weight - whole
        )
        return math.sqrt(lost / (self._energy(self.outputs, self.weight) or 1.0))

    def shift(self, whole: Tensor) -> Tensor:
        """``(W - W') E[x]``."""
        return (self.weight - whole).flatten(1) @ self.mean

    def _features(self, stages: list[Stage], before: list[Tensor]) -> Tensor:
        """What each weight of the last stage multiplies: the stage's input under each of its taps, group by group."""
        inner = compose(stages[:-1], before)
        inputs = inner.shape[1]
        taps = self.weight.shape[2:]
        rows = self.rows.reshape(-1, inputs, *taps)
        # the axes of the last stage stay, the others are summed with the inner chain's taps
        letters = "xyz"[: len(taps)]
        held = "".join(letters[axis] for axis in stages[-1].axes)
        summed = "".join(letter for letter in letters if letter not in held)
        sizes = [inner.shape[2 + letters.index(letter)] for letter in summed]
        inner = inner.reshape(*inner.shape[:2], *sizes).float()
        features = torch.einsum(f"ni{letters},ci{summed}->nc{held}", rows, inner)
        grouped = features.reshape(len(rows), stages[-1].groups, -1)
        return grouped.transpose(0, 1)

    def _energy(self, outputs: Tensor, weight: Tensor) -> float:
        """The mean square of a layer's outputs: on the rows, and on inputs of equal uncorrelated channels."""
        seen = float(outputs.square().sum()) / len(outputs)
        unseen = self._variance * float(weight.square().sum())
        return (1 - self._shrinkage) * seen + self._shrinkage * unseen

    def _whitener(self) -> tuple[Tensor, float]:
        """The lower Cholesky factor of the channels' covariance, and the share by which it was shrunk."""
        inputs = self.weight.shape[1]
        taps = self.rows.reshape(len(self.rows), inputs, -1)
        count, area = len(taps), taps.shape[2]
        flat = taps.transpose(1, 2).flatten(0, 1)
        covariance = (flat.T @ flat).double() / max(count * area, 1)
        own = (taps.transpose(1, 2) @ taps).double().square().sum(dim=(1, 2)) / area**2  # a row's
        norm = float(covariance.square().sum())
        scale = float(covariance.diagonal().mean())
        apart = norm - inputs * scale**2
        scatter = (float(own.mean()) - norm) / count
        share = (
            min(max(scatter / apart, _LEAST_SHRINKAGE), _MOST_SHRINKAGE)
            if apart > 0
            else _MOST_SHRINKAGE
        )
        covariance *= 1 - share
        covariance.diagonal().add_(share * scale + 1e-12)
        root: Tensor = torch.linalg.cholesky(covariance)
        return root, share
