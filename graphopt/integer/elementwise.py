"""``graphopt::quantize``, ``dequantize``, ``requantize`` and ``add``: one element in, one element out."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.integer import arithmetic, library


def _fake_quantize(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    library.require(x.dtype == torch.float32, "quantize", "x", f"float32, not {x.dtype}")
    arithmetic.check_scale(scale, "graphopt::quantize: the scale")
    return x.new_empty(x.shape, dtype=library.output_dtype("quantize", zero_point, qmin, qmax))


@library.register(
    "quantize(Tensor x, float scale, int zero_point, int qmin, int qmax) -> Tensor", _fake_quantize
)
def quantize(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """``clamp(zero_point + rint(x * (1 / scale)), qmin, qmax)``; NaN becomes ``qmin``."""
    _fake_quantize(x, scale, zero_point, qmin, qmax)
    return arithmetic.quantize(x, scale, zero_point, qmin, qmax)


def _fake_dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    library.check_quantized("dequantize", "q", q, zero_point)
    arithmetic.check_scale(scale, "graphopt::dequantize: the scale")
    return q.new_empty(q.shape, dtype=torch.float32)


@library.register("dequantize(Tensor q, float scale, int zero_point) -> Tensor", _fake_dequantize)
def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``float32(q - zero_point) * scale``."""
    _fake_dequantize(q, scale, zero_point)
    return arithmetic.dequantize(q, scale, zero_point).contiguous()


def _fake_requantize(
    q: Tensor, multiplier: float, x_zero_point: int, y_zero_point: int, qmin: int, qmax: int
) -> Tensor:
    library.check_quantized("requantize", "q", q, x_zero_point)
    library.check_multiplier("requantize", multiplier)
    return q.new_empty(q.shape, dtype=library.output_dtype("requantize", y_zero_point, qmin, qmax))


@library.register(
    "requantize(Tensor q, float multiplier, int x_zero_point, int y_zero_point, int qmin, int qmax) -> Tensor",
    _fake_requantize,
)
def requantize(
    q: Tensor, multiplier: float, x_zero_point: int, y_zero_point: int, qmin: int, qmax: int
) -> Tensor:
    """``y_zp + rint(clamp(float32(q - x_zp) * multiplier, ...))``; a lone ReLU has multiplier 1 and ``qmin = y_zp``."""
    _fake_requantize(q, multiplier, x_zero_point, y_zero_point, qmin, qmax)
    factor = torch.tensor(multiplier, dtype=torch.float32, device=q.device)
    return arithmetic.rescale(arithmetic.centre(q, x_zero_point), factor, y_zero_point, qmin, qmax)


def _fake_add(
    a: Tensor,
    b: Tensor,
    a_multiplier: int,
    b_multiplier: int,
    shift: int,
    a_zero_point: int,
    b_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    library.check_quantized("add", "a", a, a_zero_point)
    library.check_quantized("add", "b", b, b_zero_point)
    bits = arithmetic.ADD_BITS
    fits = max(abs(a_multiplier), abs(b_multiplier)) < 2**bits
    library.require(fits, "add", "each multiplier", f"below 2**{bits} in magnitude")
    low, high = arithmetic.MIN_SHIFT, arithmetic.MAX_SHIFT
    library.require(low <= shift <= high, "add", "shift", f"within {low}..{high}, not {shift}")
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.new_empty(shape, dtype=library.output_dtype("add", y_zero_point, qmin, qmax))


@library.register(
    "add(Tensor a, Tensor b, int a_multiplier, int b_multiplier, int shift, int a_zero_point, int b_zero_point, "
    "int y_zero_point, int qmin, int qmax) -> Tensor",
    _fake_add,
)
def add(
    a: Tensor,
    b: Tensor,
    a_multiplier: int,
    b_multiplier: int,
    shift: int,
    a_zero_point: int,
    b_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """``v = (a - a_zp) * a_multiplier + (b - b_zp) * b_multiplier`` in int32, then
    ``y_zp + rint(clamp(float32(v) * 2**-shift, qmin - y_zp, qmax - y_zp))``; shapes broadcast.
    """
    arguments = (a_zero_point, b_zero_point, y_zero_point, qmin, qmax)
    _fake_add(a, b, a_multiplier, b_multiplier, shift, *arguments)
    v = arithmetic.centre(a, a_zero_point) * a_multiplier
    v = v + arithmetic.centre(b, b_zero_point) * b_multiplier
    factor = torch.tensor(2.0**-shift, dtype=torch.float32, device=a.device)
    return arithmetic.rescale(v, factor, y_zero_point, qmin, qmax)
