"""Where to clip a histogram: by percentile, by squared error, by Kullback-Leibler divergence.

The searches walk a grid of ranges inside the observed one: each end is a fraction of the observed end, so 0 is always
held and the whole range is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from graphopt.passes.quantize.histogram import StreamingHistogram
from graphopt.passes.quantize.qparams import QParams, activation_qparams
from graphopt.passes.quantize.spec import ActivationSpec

Array = npt.NDArray[np.float64]
_COARSE = np.linspace(0.1, 1.0, 46)
_FINE = np.linspace(-0.018, 0.018, 10)
_UNSEEN = 1e-10  # probability given to a bin that the quantized distribution misses


def percentile(histogram: StreamingHistogram, percent: float) -> tuple[float, float]:
    """The ends between which ``percent`` of the values lie at each side, linear within a bin; 0 stays inside."""
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    total = cumulative[-1]
    if total == 0 or histogram.low == histogram.high:
        return histogram.low, histogram.high
    targets = np.array([1.0 - percent / 100.0, percent / 100.0]) * total
    low, high = np.interp(targets, cumulative, histogram.edges)
    return max(min(low, 0.0), histogram.low), min(max(high, 0.0), histogram.high)


def squared_error(histogram: StreamingHistogram, spec: ActivationSpec) -> tuple[float, float]:
    """The range with the least ``sum count * (x - fake_quantize(x))**2`` over the bins' centres."""
    held = histogram.counts > 0
    centres = (histogram.edges[:-1] + histogram.width / 2)[held]
    counts = histogram.counts[held].astype(np.float64)

    def cost(low: float, high: float) -> float:
        gap = quantized(centres, activation_qparams(low, high, spec)) - centres
        return float(counts @ (gap * gap))

    return _search(histogram, cost)


def entropy(histogram: StreamingHistogram, spec: ActivationSpec) -> tuple[float, float]:
    """The range with the least ``KL(P || Q)``.

    P is the histogram with everything outside moved into the outermost bins inside; Q has, for each quantization
    level, the counts inside the range (without those that were moved) spread evenly over the level's bins that P holds.
    Exact zeros are left out: quantization keeps them, and a ReLU's would drown everything else.
    """
    centres = histogram.edges[:-1] + histogram.width / 2
    counts = histogram.counts.astype(np.float64)
    counts[-histogram.first] -= histogram.zeros
    if not counts.any():
        return histogram.low, histogram.high

    def cost(low: float, high: float) -> float:
        qparams = activation_qparams(low, high, spec)
        half = histogram.width / 2
        inside = np.flatnonzero((centres >= low - half) & (centres <= high + half))
        first, last = inside[0], inside[-1] + 1
        kept = counts[first:last]
        reference = kept.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        level = levels(centres[first:last], qparams) - qparams.qmin
        return divergence(reference, kept, level, qparams.qmax - qparams.qmin + 1)

    return _search(histogram, cost)


def divergence(reference: Array, kept: Array, level: npt.NDArray[np.int64], size: int) -> float:
    """``KL(P || Q)`` of the reference counts against the kept counts averaged within each level."""
    held = reference > 0
    bins = np.bincount(level, weights=held, minlength=size)
    mass = np.bincount(level, weights=kept, minlength=size)
    average = np.where(held, (mass / np.maximum(bins, 1.0))[level], 0.0)
    if average.sum() == 0.0:
        return float("inf")
    p = reference[held] / reference.sum()
    q = np.maximum(average[held] / average.sum(), _UNSEEN)
    return float(np.sum(p * np.log(p / q)))


def levels(values: Array, qparams: QParams) -> npt.NDArray[np.int64]:
    """``clamp(rint(x / scale) + zero_point, qmin, qmax)``."""
    nearest = np.rint(values / qparams.scale) + qparams.zero_point
    clipped: npt.NDArray[np.int64] = np.clip(nearest, qparams.qmin, qparams.qmax).astype(np.int64)
    return clipped


def quantized(values: Array, qparams: QParams) -> Array:
    """The values that quantization leaves."""
    return (levels(values, qparams) - qparams.zero_point).astype(np.float64) * qparams.scale


def _search(
    histogram: StreamingHistogram, cost: Callable[[float, float], float]
) -> tuple[float, float]:
    """Grid search over both ends in turn, coarse and then fine around the best; ties keep the wider range."""
    low, high = histogram.low, histogram.high
    if low == high:
        return low, high
    best = (1.0, 1.0)
    least = cost(low, high)
    for grid in (_COARSE, _FINE, _FINE):
        for candidate in list(_candidates(best, grid, relative=grid is _FINE)):
            value = cost(low * candidate[0], high * candidate[1])
            if value < least:
                best, least = candidate, value
    return low * best[0], high * best[1]


def _candidates(
    best: tuple[float, float], grid: Array, relative: bool
) -> Iterator[tuple[float, float]]:
    """Both ends shrunk alike, then each end alone."""
    for step in grid[::-1]:
        a, b = (best[0] + step, best[1] + step) if relative else (step, step)
        trials = ((a, b), (a, best[1]), (best[0], b)) if relative else ((a, b), (a, 1.0), (1.0, b))
        for x, y in trials:
            yield float(min(max(x, 0.01), 1.0)), float(min(max(y, 0.01), 1.0))
