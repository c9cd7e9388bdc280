"""A histogram of a stream in constant memory: bins of width ``2**k`` that merge in pairs when the range grows.

A value's bin is ``floor(x / 2**k)``, exact because division by a power of two is. Widening halves every index, so the
result does not depend on the order in which the batches came.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from graphopt.arrays import to_numpy

BINS = 4096
_PIECE = 1 << 20
_SMALLEST_EXPONENT = -160  # every float32 is a multiple of 2**-149


class StreamingHistogram:
    """Counts of finite float32 values, always over a range that holds 0. ``counts`` is int64 ``[bins]``."""

    def __init__(self, bins: int = BINS) -> None:
        self.bins = bins
        self.counts: npt.NDArray[np.int64] = np.zeros(bins, dtype=np.int64)
        self.exponent: int | None = None  # None until a value other than 0 came
        self.first = 0  # index of counts[0]
        self.zeros = 0  # how many values are exactly 0
        self.low = 0.0
        self.high = 0.0

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent or 0)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Float64 ``[bins + 1]``."""
        return np.ldexp(
            (self.first + np.arange(self.bins + 1)).astype(np.float64), self.exponent or 0
        )

    def update(self, values: torch.Tensor) -> None:
        """Add every element of a tensor; raises ValueError for NaN and infinity."""
        if values.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a histogram counts finite values")
        self._widen(min(low, 0.0), max(high, 0.0))
        self.zeros += values.numel() - int(torch.count_nonzero(values))
        if self.exponent is None:
            self.counts[0] += values.numel()
            return
        # In double, where no value underflows to the bin of 0, and in pieces, so that no copy is as large as the tensor.
        for piece in torch.split(values.detach().reshape(-1), _PIECE):
            scaled = piece.double() * math.ldexp(1.0, -self.exponent)
            indices = scaled.floor_().to(torch.int64).sub_(self.first)
            self.counts += to_numpy(torch.bincount(indices, minlength=self.bins))

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.low == self.high:
            return
        old = self.exponent
        exponent = _SMALLEST_EXPONENT if old is None else old
        spread = (self.high - self.low) / self.bins
        exponent = max(exponent, math.frexp(spread)[1] - 1)
        while self._index(self.high, exponent) - self._index(self.low, exponent) >= self.bins:
            exponent += 1
        first = self._index(self.low, exponent)
        if old is not None and (exponent, first) == (old, self.first):
            return
        shift = 0 if old is None else exponent - old
        moved = ((self.first + np.arange(self.bins)) >> shift) - first
        held = self.counts > 0
        counts = np.zeros_like(self.counts)
        np.add.at(counts, moved[held], self.counts[held])
        self.counts, self.first, self.exponent = counts, first, exponent

    @staticmethod
    def _index(value: float, exponent: int) -> int:
        return math.floor(math.ldexp(value, -exponent))
