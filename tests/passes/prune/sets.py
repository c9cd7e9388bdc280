"""Granules without a network, for schedules alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.weights import Weight


class Sets(Granules):
    """Granules of the shape of ``scores`` and the given sizes."""

    def __init__(self, scores: Tensor, sizes: Tensor | int) -> None:
        self._shape, self._sizes = tuple(scores.shape), sizes

    @property
    def label(self) -> str:
        return "sets"

    @property
    def weights(self) -> tuple[Weight, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def sizes(self) -> Tensor | int:
        return self._sizes

    def mean(self, elements: Mapping[Weight, Tensor], makers: bool = False) -> Tensor:
        raise NotImplementedError

    def masks(self, keep: Tensor) -> dict[Weight, Tensor]:
        raise NotImplementedError
