"""Observers: from a stream of activations to the range that is quantized, in memory that does not grow.

minmax          the smallest and the largest value
moving-average  ``m <- m + momentum * (batch's - m)`` of the batches' minima and maxima (Jacob et al. 2018)
percentile      cuts ``100 - percentile`` percent at each end that leaves 0
mse             the range with the least squared error of quantization
entropy         the range with the least Kullback-Leibler divergence (Migacz 2017)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from graphopt.errors import QuantizeError
from graphopt.passes.quantize import clipping
from graphopt.passes.quantize.histogram import StreamingHistogram
from graphopt.passes.quantize.spec import ActivationSpec

OBSERVERS = ("minmax", "moving-average", "percentile", "mse", "entropy")


class Observer(ABC):
    """Sees finite float tensors one after another; ``range`` is what to quantize."""

    @abstractmethod
    def update(self, values: torch.Tensor, low: float, high: float) -> None:
        """One more tensor; ``low`` and ``high`` are its smallest and largest value."""

    @abstractmethod
    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        """(low, high) over all that was seen."""


class MinMax(Observer):
    def __init__(self) -> None:
        self.low = self.high = 0.0

    def update(self, values: torch.Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage(Observer):
    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.ends: tuple[float, float] | None = None

    def update(self, values: torch.Tensor, low: float, high: float) -> None:
        if self.ends is None:
            self.ends = low, high
            return
        old_low, old_high = self.ends
        step = self.momentum
        self.ends = old_low + step * (low - old_low), old_high + step * (high - old_high)

    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        return self.ends or (0.0, 0.0)


@dataclass
class _Histogram(Observer):
    """Counts everything; subclasses choose the range from the counts."""

    def __post_init__(self) -> None:
        self.histogram = StreamingHistogram()

    def update(self, values: torch.Tensor, low: float, high: float) -> None:
        self.histogram.update(values)


@dataclass
class Percentile(_Histogram):
    percentile: float

    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        return clipping.percentile(self.histogram, self.percentile)


class SquaredError(_Histogram):
    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        return clipping.squared_error(self.histogram, spec)


class Entropy(_Histogram):
    def range(self, spec: ActivationSpec) -> tuple[float, float]:
        return clipping.entropy(self.histogram, spec)


@dataclass(frozen=True)
class ObserverOptions:
    """Which observer, and its parameter. Raises QuantizeError for an unknown name or a parameter out of range."""

    observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise QuantizeError(f"observer {self.observer!r} is none of {', '.join(OBSERVERS)}")
        if not 50.0 < self.percentile <= 100.0:
            raise QuantizeError(
                f"percentile must lie above 50 and at most at 100, not at {self.percentile}"
            )
        if not 0.0 < self.momentum <= 1.0:
            raise QuantizeError(f"momentum must lie above 0 and at most at 1, not {self.momentum}")

    def make(self) -> Observer:
        """A fresh observer for one tensor."""
        if self.observer == "minmax":
            return MinMax()
        if self.observer == "moving-average":
            return MovingAverage(self.momentum)
        if self.observer == "percentile":
            return Percentile(self.percentile)
        return SquaredError() if self.observer == "mse" else Entropy()
