"""Scale and zero point of a range: ``scale = (high - low) / (qmax - qmin)``, ``zero_point = qmin - rint(low / scale)``.

The range always includes 0, so that zero (padding, ReLU's floor) is exact; a scale is a normal float32 number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphopt.passes.quantize.spec import ActivationSpec, WeightSpec

SMALLEST_SCALE = 2.0**-126  # normal in float32, and so is its inverse
LARGEST_SCALE = 2.0**126
_FRACTIONS = torch.linspace(0.3, 1.0, 71, dtype=torch.float64)


@dataclass(frozen=True)
class QParams:
    """``q = clamp(rint(x / scale) + zero_point, qmin, qmax)``; ``scale`` holds a float32 value."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int


def activation_qparams(low: float, high: float, spec: ActivationSpec) -> QParams:
    """Parameters of the range [low, high], widened to hold 0. An empty range (all zero) stands for [0, 1].

    The scale of a tensor that is always zero still sets the steps in which the next layer's bias is counted.

    Raises ValueError unless ``low <= high`` and both are finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"[{low}, {high}] is no range")
    low, high = min(low, 0.0), max(high, 0.0)
    steps = spec.qmax - spec.qmin
    if low == high:
        high = 1.0
    if spec.symmetric:
        middle = _middle(spec)
        scale = as_scale(max(-low, high) / (spec.qmax - middle))
        return QParams(scale, middle, spec.qmin, spec.qmax)
    scale = as_scale(high / steps - low / steps)
    zero_point = spec.qmin - int(np.rint(low / scale))
    return QParams(scale, min(max(zero_point, spec.qmin), spec.qmax), spec.qmin, spec.qmax)


def as_scale(value: float) -> float:
    """``value`` rounded to float32 and kept within the normal, finite numbers."""
    return float(np.float32(min(max(value, SMALLEST_SCALE), LARGEST_SCALE)))


def weight_scales(weight: torch.Tensor, spec: WeightSpec, floor: torch.Tensor) -> torch.Tensor:
    """Symmetric scales, float32 ``[out_channels]`` (``[1]`` per tensor); ``weight`` has its channels on axis 0.

    ``scale = max|w| / qmax``, or the fraction of it with the least squared error. A channel of zeros takes the
    smallest scale of the others. ``floor`` (float64 ``[out_channels]``) bounds the scales from below.
    """
    rows = weight.detach().double().reshape(weight.shape[0], -1)
    if not spec.per_channel:
        rows, floor = rows.reshape(1, -1), floor.max().reshape(1)
    largest = rows.abs().amax(dim=1)
    scales = largest / spec.qmax
    if spec.observer == "mse":
        scales = _least_squared_error(rows, scales, spec)
    used = scales[largest > 0]
    scales = torch.where(largest > 0, scales, used.min() if used.numel() else torch.tensor(1.0))
    scales = torch.maximum(scales, floor)
    return scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).float()


def _least_squared_error(
    rows: torch.Tensor, scales: torch.Tensor, spec: WeightSpec
) -> torch.Tensor:
    best = scales
    least = torch.full_like(scales, torch.inf)
    for fraction in _FRACTIONS.flip(0):
        trial = (scales * fraction).clamp(min=SMALLEST_SCALE)
        quantized = (rows / trial[:, None]).round().clamp(spec.qmin, spec.qmax) * trial[:, None]
        error = (quantized - rows).square().sum(dim=1)
        best = torch.where(error < least, trial, best)
        least = torch.minimum(error, least)
    return best


def _middle(spec: ActivationSpec) -> int:
    return 1 << (spec.bits - 1)
