"""Spatial SVD: a k x l convolution becomes k x 1 and 1 x l."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.passes.factorize.decomposition import MatrixDecomposition, Spectrum, Stage
from graphopt.passes.factorize.factorize import Factorize, Layer
from graphopt.passes.factorize.ranks import Ranks
from graphopt.registry import register


class _Separable(MatrixDecomposition):
    """``W[o, i, y, x] = sum_r H[o, r, x] V[r, i, y]``: the SVD of W as an [in * k, out * l] matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        outputs, inputs, rows, columns = weight.shape
        matrix = weight.permute(1, 2, 0, 3).reshape(inputs * rows, outputs * columns)
        self._spectrum = Spectrum(matrix)

    @property
    def full(self) -> Ranks:
        return (min(self._spectrum.matrix.shape),)

    def stages(self, ranks: Ranks) -> list[Stage]:
        (rank,) = ranks
        outputs, inputs, rows, columns = self.weight.shape
        return [
            Stage("rows", (rank, inputs, rows, 1), (0,)),
            Stage("columns", (outputs, rank, 1, columns), (1,)),
        ]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        (rank,) = ranks
        outputs, _, _, columns = self.weight.shape
        first, last = self._spectrum.factors(rank)
        vertical, _ = self.stages(ranks)
        horizontal = last.reshape(rank, outputs, 1, columns).transpose(0, 1)
        return [first.T.reshape(vertical.shape), horizontal]


@register
@dataclass(frozen=True)
class SpatialSvd(Factorize):
    """Factor a k x l convolution into k x 1 and 1 x l convolutions of rank r (Jaderberg et al. 2014, scheme 2).

    ``W[o, i, y, x] ~= sum_r H[o, r, x] * V[r, i, y]``: the rank-r truncation of the SVD of W as an [in * k, out * l]
    matrix, optimal in Frobenius norm. Declines kernels of one row or column, groups, weights that are shared, computed,
    masked or fake-quantized, and ranks at which MACs or parameters would grow.
    """

    name: ClassVar[str] = "spatial-svd"

    def unfit(self, layer: Layer) -> str | None:
        rows, columns = layer.weight.shape[2:]
        if min(rows, columns) == 1:
            return f"its kernel is {rows} x {columns}: there is nothing to separate"
        return super().unfit(layer)

    def decomposed(self, weight: Tensor) -> MatrixDecomposition:
        return _Separable(weight)
