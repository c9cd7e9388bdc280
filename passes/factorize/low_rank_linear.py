"""Low rank of linear layers and 1 x 1 convolutions: ``W = A B`` by the singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.passes.factorize.decomposition import MatrixDecomposition, Spectrum, Stage
from graphopt.passes.factorize.factorize import Factorize, Layer
from graphopt.passes.factorize.ranks import Ranks
from graphopt.registry import register


class _Matrix(MatrixDecomposition):
    """``W [out, in] = A [out, r] B [r, in]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._spectrum = Spectrum(weight.flatten(1))

    @property
    def full(self) -> Ranks:
        return (min(self.weight.shape[:2]),)

    def stages(self, ranks: Ranks) -> list[Stage]:
        (rank,) = ranks
        outputs, inputs, *taps = self.weight.shape
        axes = tuple(range(len(taps)))
        return [Stage("in", (rank, inputs, *taps), axes), Stage("out", (outputs, rank, *taps))]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        last, first = self._spectrum.factors(*ranks)
        return [
            factor.reshape(stage.shape)
            for factor, stage in zip((first, last), self.stages(ranks), strict=True)
        ]


@register
@dataclass(frozen=True)
class LowRankLinear(Factorize):
    """``W x -> A (B x)``: a linear layer or 1 x 1 convolution of rank r, by truncated SVD (Sainath et al. 2013).

    Optimal in Frobenius norm; with ``calibration`` optimal for the layer's outputs on that data (the SVD of
    ``W C^(1/2)``, C the covariance of its inputs). The first factor takes a convolution's stride and padding.
    Declines larger kernels, groups, weights that are shared, computed, masked or fake-quantized, and ranks at which
    MACs or parameters would grow.
    """

    name: ClassVar[str] = "low-rank-linear"
    operators: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d", "conv2d_same")

    def unfit(self, layer: Layer) -> str | None:
        taps = layer.weight.shape[2:]
        if math.prod(taps) != 1:
            kernel = " x ".join(map(str, taps))
            return f"its kernel is {kernel}; spatial-svd, tucker-conv or cp-conv factor it"
        return super().unfit(layer)

    def decomposed(self, weight: Tensor) -> MatrixDecomposition:
        return _Matrix(weight)
