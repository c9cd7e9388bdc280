"""``q = zero_point + rint(clamp(v, qmin - zero_point, qmax - zero_point))``: the arithmetic that the integer ops share.

Accumulation is exact in int32. Every rescaling is one float32 product, rounded half to even, and no product feeds a
float sum, so that no compiler can contract it. Scales are float32 values, whatever Python type carries them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import IntegerizeError

INT32_MAX = 2**31 - 1
ACTIVATION_MAX = 255  # |q - zero_point| of any 8-bit activation
ADD_BITS = 21  # fixed-point multipliers of add stay below 2**21: |v| < 2 * 255 * 2**21 < 2**31
MIN_SHIFT, MAX_SHIFT = -127, 126  # 2**-shift is a normal float32
MIN_SCALE, MAX_SCALE = (
    2.0**-126,
    2.0**126,
)  # neither a scale nor its inverse may overflow or be denormal


def float32(value: float) -> float:
    """``value`` rounded to float32, as a Python float."""
    return float(torch.tensor(value, dtype=torch.float32))


def check_scale(scale: float, what: str) -> None:
    """Raise IntegerizeError unless ``scale`` is finite, positive and has a normal float32 inverse."""
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise IntegerizeError(
            f"{what} is {scale!r}; it must be a positive float32 number between 2**-126 and 2**126"
        )


def dtype_of(qmin: int, qmax: int) -> torch.dtype:
    """uint8, or int8 where ``qmin`` is negative. Raises IntegerizeError for an empty range or one wider than 8 bits."""
    low, high = (-128, 127) if qmin < 0 else (0, 255)
    if not low <= qmin <= qmax <= high:
        raise IntegerizeError(
            f"the range {qmin}..{qmax} is no part of uint8 (0..255) or int8 (-128..127)"
        )
    return torch.int8 if qmin < 0 else torch.uint8


@dataclass(frozen=True)
class QParams:
    """Per-tensor affine quantization: ``real = scale * (q - zero_point)``, ``qmin <= q <= qmax``; scale is float32."""

    scale: float
    zero_point: int
    qmin: int = 0
    qmax: int = 255

    def __post_init__(self) -> None:
        check_scale(self.scale, "an activation's scale")
        dtype_of(self.qmin, self.qmax)
        if not -128 <= self.zero_point <= 255:
            raise IntegerizeError(f"the zero point {self.zero_point} does not fit 8 bits")
        object.__setattr__(self, "scale", float32(self.scale))

    def quantize(self, value: float) -> int:
        """The integer that ``value`` quantizes to; infinities saturate."""
        x = torch.tensor(value, dtype=torch.float32)
        return int(quantize(x, self.scale, self.zero_point, self.qmin, self.qmax))


@dataclass(frozen=True)
class FixedPointAdd:
    """``v = a * a_multiplier + b * b_multiplier`` stands for ``2**shift * (s_a * a + s_b * b) / s_y``, exactly in int32.

    The largest shift at which the larger multiplier stays below 2**21.
    """

    a_multiplier: int
    b_multiplier: int
    shift: int

    @classmethod
    def of(cls, a_scale: float, b_scale: float, y_scale: float) -> FixedPointAdd:
        """Multipliers of ``y = a + b``; a negative scale subtracts. Raises IntegerizeError where no shift fits."""
        ratio = max(abs(a_scale), abs(b_scale)) / y_scale
        if not (math.isfinite(ratio) and ratio > 0):
            raise IntegerizeError(f"cannot add at scales {a_scale!r}, {b_scale!r} to {y_scale!r}")
        shift = min(ADD_BITS + 1 - math.frexp(ratio)[1], MAX_SHIFT)
        while round(math.ldexp(ratio, shift)) >= 2**ADD_BITS:
            shift -= 1
        if shift < MIN_SHIFT:
            raise IntegerizeError(
                f"an addition's inputs are {ratio:.3g} times coarser than its output; recalibrate its scales"
            )
        a, b = (round(math.ldexp(scale / y_scale, shift)) for scale in (a_scale, b_scale))
        return cls(a, b, shift)


def quantize(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """``clamp(zero_point + rint(x * (1 / scale)), qmin, qmax)`` in float32, half to even; NaN becomes ``qmin``."""
    inverse = 1.0 / torch.tensor(scale, dtype=torch.float32, device=x.device)
    low, high = (
        torch.tensor(float(bound - zero_point), dtype=torch.float32, device=x.device)
        for bound in (qmin, qmax)
    )
    v = x * inverse
    v = torch.where(v > low, v, low)
    v = torch.where(v < high, v, high)
    return _round(v, zero_point, qmin, qmax)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``float32(q - zero_point) * float32(scale)``."""
    return centre(q, zero_point).to(torch.float32) * torch.tensor(
        scale, dtype=torch.float32, device=q.device
    )


def rescale(acc: Tensor, multiplier: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """``zero_point + rint(clamp(float32(acc) * multiplier, qmin - zero_point, qmax - zero_point))`` for int32 ``acc``."""
    v = acc.to(torch.float32) * multiplier
    v = torch.clamp(v, float(qmin - zero_point), float(qmax - zero_point))
    return _round(v, zero_point, qmin, qmax)


def _round(v: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    q = torch.round(v).to(torch.int32) + zero_point
    return q.to(dtype_of(qmin, qmax)).contiguous()


def centre(q: Tensor, zero_point: int) -> Tensor:
    """``q - zero_point`` in int32."""
    return q.to(torch.int32) - zero_point


def check_accumulator(weight: Tensor, bias: Tensor) -> None:
    """Raise IntegerizeError where ``sum |w| * 255 + |bias|`` of an output channel leaves int32."""
    bound = weight.to(torch.float64).flatten(1).abs().sum(1) * ACTIVATION_MAX
    bound = bound + bias.to(torch.float64).abs()
    worst = int(bound.argmax())
    if bound[worst] > INT32_MAX:
        raise IntegerizeError(
            f"the accumulator of output channel {worst} can reach {int(bound[worst])}, beyond int32; "
            "split the layer's input channels or keep it in float"
        )


def window_counts(
    size: int, kernel: int, stride: int, padding: int, windows: int, include_pad: bool
) -> list[int]:
    """Along one axis, the elements that each pooling window counts (torch's rule).

    A window may reach past the padding in ceil mode: what lies there never counts.
    """
    counts = []
    for window in range(windows):
        start = window * stride - padding
        end = min(start + kernel, size + padding)
        counts.append(end - start if include_pad else min(end, size) - max(start, 0))
    return counts
