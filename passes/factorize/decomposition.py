"""A weight as a chain of smaller ones: what every factorization offers, and the algebra that they share.

A weight is [out, in, taps...] in float64 (no taps for a linear layer). Each stage of a chain is a convolution that spans
the spatial axes it names; no axis is spanned twice, so that the chain equals one convolution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.arrays import to_numpy
from graphopt.passes.factorize.ranks import Array, Ranks
from graphopt.passes.factorize.vbmf import vbmf_rank


@dataclass(frozen=True)
class Stage:
    """The shape [out, in / groups, taps...] of one convolution of a chain, and the spatial axes that it walks along.

    The stage that names an axis takes its stride, padding and dilation.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    groups: int = 1


class Decomposition(ABC):
    """One weight at every rank. A pure function of the weight: no graph, no data."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.energy = float(weight.square().sum()) or 1.0

    @property
    @abstractmethod
    def full(self) -> Ranks:
        """The rank of each mode at which nothing is lost."""

    @abstractmethod
    def stages(self, ranks: Ranks) -> list[Stage]:
        """The chain at these ranks, from the input on."""

    @abstractmethod
    def factors(self, ranks: Ranks) -> list[Tensor]:
        """The weights of ``stages(ranks)``."""

    @abstractmethod
    def errors(self, ranks: Sequence[Ranks]) -> Array:
        """``||W - W'||^2 / ||W||^2`` at each of ``ranks``, smallest first."""

    @abstractmethod
    def signal_ranks(self) -> Ranks:
        """The rank of each mode that variational Bayes tells from noise."""


def compose(stages: Sequence[Stage], factors: Sequence[Tensor]) -> Tensor:
    """The weight [out, in, taps...] of the one convolution that a chain equals."""
    whole = expand(stages[0], factors[0])
    for stage, factor in zip(stages[1:], factors[1:], strict=True):
        # [groups, out / groups, in / groups, taps] x [groups, in / groups, whole's in, taps], one side's taps being 1
        taps = factor.shape[2:]
        left = factor.reshape(stage.groups, -1, factor.shape[1], *taps)
        right = whole.reshape(stage.groups, factor.shape[1], *whole.shape[1:])
        left = left.reshape(*left.shape[:3], math.prod(taps))
        right = right.reshape(*right.shape[:3], math.prod(whole.shape[2:]))
        product = torch.einsum("goit,gicu->goctu", left, right)
        product = product.reshape(-1, whole.shape[1], *taps, *whole.shape[2:])
        whole = _merge(product, len(taps))
    return whole


def expand(stage: Stage, factor: Tensor) -> Tensor:
    """A grouped weight as the dense one that it stands for."""
    if stage.groups == 1:
        return factor
    size = factor.shape[1]
    dense = factor.new_zeros(factor.shape[0], size * stage.groups, *factor.shape[2:])
    for group, rows in enumerate(torch.arange(factor.shape[0]).chunk(stage.groups)):
        dense[rows, group * size : (group + 1) * size] = factor[rows]
    return dense


def _merge(product: Tensor, axes: int) -> Tensor:
    """[out, in, taps of one stage..., taps of the other...] with each axis' two sizes, one of them 1, made one."""
    sizes = [max(product.shape[2 + a], product.shape[2 + axes + a]) for a in range(axes)]
    order = [0, 1, *(2 + a + side * axes for a in range(axes) for side in (0, 1))]
    return product.permute(order).reshape(product.shape[0], product.shape[1], *sizes)


class Spectrum:
    """The singular value decomposition of a matrix through the eigenvectors of its smaller Gram matrix, in float64.

    Twice as fast as LAPACK's on square matrices, 10 times on 512 x 4608; what squaring loses (1e-8 of the largest
    singular value) lies below float32.
    """

    def __init__(self, matrix: Tensor, wide: bool | None = None) -> None:
        """``wide`` takes the rows' Gram matrix whatever the shape."""
        self.matrix = matrix
        self._wide = matrix.shape[0] <= matrix.shape[1] if wide is None else wide
        squares, self._vectors = torch.linalg.eigh(
            matrix @ matrix.T if self._wide else matrix.T @ matrix
        )
        self.squares = squares.flip(0).clamp(min=0)
        self._vectors = self._vectors.flip(1)

    @property
    def values(self) -> Tensor:
        """The singular values, descending."""
        values: Tensor = self.squares.sqrt()
        return values

    def tails(self) -> Array:
        """What is lost at rank 0, 1, ...: the sums of the squares from there on."""
        sums = self.squares.flip(0).cumsum(0).flip(0)
        return np.concatenate([to_numpy(sums), np.zeros(1)])

    def left(self, rank: int) -> Tensor:
        """The leading left singular vectors [rows, rank], where the rows' Gram matrix was taken."""
        assert self._wide
        leading: Tensor = self._vectors[:, :rank]
        return leading

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A`` [rows, rank] and ``B`` [rank, columns] with ``A B`` the best approximation and columns of equal norms."""
        vectors = self._vectors[:, :rank]
        scale = self.values[:rank].clamp(min=1e-12 * float(self.values[0]) or 1.0).sqrt()
        if self._wide:
            return vectors * scale, vectors.T @ self.matrix / scale[:, None]
        return self.matrix @ vectors / scale, (vectors * scale).T


class MatrixDecomposition(Decomposition):
    """Of the weight as one matrix: its ranks are those of the truncated SVD, ``_spectrum``."""

    _spectrum: Spectrum

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        lost: Array = self._spectrum.tails()[np.array(ranks)[:, 0]] / self.energy
        return lost

    def signal_ranks(self) -> Ranks:
        return (vbmf_rank(self._spectrum.values, *self._spectrum.matrix.shape),)


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """The matrix whose rows are the slices along ``axis``."""
    return tensor.movedim(axis, 0).flatten(1)


def relative(difference: Tensor, energy: float) -> float:
    """``||difference|| / sqrt(energy)``."""
    return math.sqrt(float(difference.square().sum()) / energy)
