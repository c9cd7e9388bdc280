"""The rank that variational Bayes gives a noisy matrix, in closed form (Nakajima, Sugiyama, Babacan, Tomioka 2013).

For ``V = B A^T + noise`` of shape L x M, ``L <= M``, the empirical variational solution keeps exactly the singular values
above ``sqrt(M * v * (1 + t) * (1 + a / t))`` with ``a = L / M``, ``t = 2.5129 * sqrt(a)`` and the noise variance v; v itself
is where the free energy, a function of v alone, is least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GRID = 256  # values of v tried, on a logarithmic scale
_ZOOMS = 3  # each grid spans one step either side of the last one's best


def vbmf_rank(singular_values: Tensor, rows: int, columns: int) -> int:
    """How many of a matrix's singular values (all of them, in descending order) are signal; 0 where it is noise alone."""
    short, long = sorted((rows, columns))
    squares = singular_values.double().square()[:short]
    total = float(squares.sum())
    if total == 0.0:
        return 0
    ratio = short / long
    tau = 2.5129 * math.sqrt(ratio)
    edge = (1 + tau) * (1 + ratio / tau)
    low, high = _noise_bounds(squares, short, long, ratio, edge)
    for _ in range(_ZOOMS):
        variances = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64)
        best = int(_free_energy(squares, variances, long, ratio, edge).argmin())
        low = float(variances[max(best - 1, 0)])
        high = float(variances[min(best + 1, _GRID - 1)])
    variance = math.sqrt(low * high)
    return int((squares > long * variance * edge).sum())


def _noise_bounds(
    squares: Tensor, short: int, long: int, ratio: float, edge: float
) -> tuple[float, float]:
    """Between which the noise variance lies: at most all is noise, at least ``short / (1 + ratio)`` values are."""
    high = float(squares.sum()) / (short * long)
    kept = max(0, min(math.ceil(short / (1 + ratio)) - 1, len(squares) - 1))
    low = max(float(squares[kept]) / (long * edge), float(squares[kept:].mean()) / long)
    # a matrix of exactly low rank has no noise at all: float32's own rounding stands in for it
    return min(max(low, high * 1e-14), high), high


def _free_energy(
    squares: Tensor, variances: Tensor, long: int, ratio: float, edge: float
) -> Tensor:
    """The free energy at each noise variance, up to a constant."""
    x = (squares / (long * variances[:, None])).clamp(min=1e-300)
    signal = x > edge
    gap = (x - (1 + ratio)).clamp(min=2 * math.sqrt(ratio))
    size = 0.5 * (gap + (gap.square() - 4 * ratio).clamp(min=0).sqrt())
    kept = x - size + ((size + 1) / x).log() + ratio * (size / ratio + 1).log()
    return torch.where(signal, kept, x - x.log()).sum(dim=1)
