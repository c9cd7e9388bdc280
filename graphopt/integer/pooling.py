"""``graphopt::max_pool2d``, ``avg_pool2d``, ``global_avg_pool``: windows and counts are torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from graphopt.integer import arithmetic, library


def _pool_shape(
    op: str,
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Any, ...]:
    library.require(q.dim() == 4, op, "q", f"[N, C, H, W], not of rank {q.dim()}")
    for name, values, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        fits = len(values) == 2 and min(values) >= least
        library.require(fits, op, name, f"two numbers of at least {least}, not {list(values)}")
    half = all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True))
    library.require(half, op, "padding", "at most half of the kernel")
    sizes = [
        _windows(
            q.shape[2 + axis],
            kernel[axis],
            stride[axis],
            padding[axis],
            dilation[axis],
            ceil_mode,
        )
        for axis in (0, 1)
    ]
    library.require(sizes[0] > 0 and sizes[1] > 0, op, "the padded q", "as large as the kernel")
    return (q.shape[0], q.shape[1], *sizes)


def _windows(
    size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> Any:
    """Number of windows along one axis; in ceil mode the last one must begin within the map or its left padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    windows = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows


def _fake_max_pool2d(
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    library.check_quantized("max_pool2d", "q", q)
    shape = _pool_shape("max_pool2d", q, kernel, stride, padding, dilation, ceil_mode)
    return q.new_empty(shape)


@library.register(
    "max_pool2d(Tensor q, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    _fake_max_pool2d,
)
def max_pool2d(
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """The largest ``q`` of each window; padding never wins (a window of padding alone gives the type's least value)."""
    _fake_max_pool2d(q, kernel, stride, padding, dilation, ceil_mode)
    pooled = functional.max_pool2d(
        q.to(torch.float32), list(kernel), list(stride), list(padding), list(dilation), ceil_mode
    )
    least = float(torch.iinfo(q.dtype).min)
    return pooled.clamp_min(least).to(q.dtype).contiguous()


def _fake_avg_pool2d(
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    library.check_quantized("avg_pool2d", "q", q, x_zero_point)
    library.check_multiplier("avg_pool2d", multiplier)
    library.require(
        divisor_override >= 0, "avg_pool2d", "divisor_override", "positive, or 0 for none"
    )
    dtype = library.output_dtype("avg_pool2d", y_zero_point, qmin, qmax)
    shape = _pool_shape("avg_pool2d", q, kernel, stride, padding, (1, 1), ceil_mode)
    return q.new_empty(shape, dtype=dtype)


@library.register(
    "avg_pool2d(Tensor q, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int divisor_override, float multiplier, int x_zero_point, int y_zero_point, int qmin, int qmax) -> Tensor",
    _fake_avg_pool2d,
)
def avg_pool2d(
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """``y_zp + rint(clamp(float32(sum (q - x_zp)) * float32(multiplier / count), qmin - y_zp, qmax - y_zp))``.

    The sum runs over the window's real elements; ``count`` follows torch: ``divisor_override`` where not 0, else the
    window clipped to the padded map (``count_include_pad``) or to the map.
    """
    shape = _fake_avg_pool2d(
        q, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, multiplier,
        x_zero_point, y_zero_point, qmin, qmax,
    ).shape  # fmt: skip
    centred = arithmetic.centre(q, x_zero_point).to(torch.float64)
    pads, sizes = (list(padding), list(kernel))
    total = functional.avg_pool2d(
        centred, sizes, list(stride), pads, ceil_mode, count_include_pad, divisor_override=1
    )
    rows, columns = (
        torch.tensor(
            arithmetic.window_counts(
                q.shape[axis + 2],
                kernel[axis],
                stride[axis],
                padding[axis],
                shape[axis + 2],
                count_include_pad,
            ),
            dtype=torch.float64,
        )
        for axis in (0, 1)
    )
    count = (
        rows[:, None] * columns if divisor_override == 0 else torch.tensor(float(divisor_override))
    )
    factor = (multiplier / count.to(torch.float64)).to(torch.float32).to(q.device)
    return arithmetic.rescale(total.to(torch.int32), factor, y_zero_point, qmin, qmax)


def _pooled_shape(
    op: str, q: Tensor, multiplier: float, x_zero_point: int, keepdim: bool
) -> tuple[Any, ...]:
    library.check_quantized(op, "q", q, x_zero_point)
    library.check_multiplier(op, multiplier)
    library.require(q.dim() == 4, op, "q", f"[N, C, H, W], not of rank {q.dim()}")
    area = q.shape[2] * q.shape[3]
    largest = arithmetic.INT32_MAX // arithmetic.ACTIVATION_MAX
    library.require(0 < area <= largest, op, "the map", f"of 1 to {largest} elements")
    return (*q.shape[:2], 1, 1) if keepdim else tuple(q.shape[:2])


def _total(q: Tensor, x_zero_point: int, keepdim: bool) -> Tensor:
    """``sum (q - x_zp)`` over height and width, exact in int32."""
    return arithmetic.centre(q, x_zero_point).sum((2, 3), keepdim=keepdim, dtype=torch.int32)


def _factor(q: Tensor, multiplier: float) -> Tensor:
    """``float32(float64(multiplier) / (H * W))``."""
    factor = torch.tensor(multiplier / (q.shape[2] * q.shape[3]), dtype=torch.float64)
    return factor.to(device=q.device, dtype=torch.float32)


def _fake_global_avg_pool(
    q: Tensor,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    keepdim: bool,
) -> Tensor:
    op = "global_avg_pool"
    shape = _pooled_shape(op, q, multiplier, x_zero_point, keepdim)
    return q.new_empty(shape, dtype=library.output_dtype(op, y_zero_point, qmin, qmax))


@library.register(
    "global_avg_pool(Tensor q, float multiplier, int x_zero_point, int y_zero_point, int qmin, int qmax, "
    "bool keepdim) -> Tensor",
    _fake_global_avg_pool,
)
def global_avg_pool(
    q: Tensor,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    keepdim: bool,
) -> Tensor:
    """``y_zp + rint(clamp(float32(sum (q - x_zp)) * float32(multiplier / (H * W)), qmin - y_zp, qmax - y_zp))``."""
    _fake_global_avg_pool(q, multiplier, x_zero_point, y_zero_point, qmin, qmax, keepdim)
    total = _total(q, x_zero_point, keepdim)
    return arithmetic.rescale(total, _factor(q, multiplier), y_zero_point, qmin, qmax)


def _fake_global_avg_pool_dequantize(
    q: Tensor, multiplier: float, x_zero_point: int, keepdim: bool
) -> Tensor:
    shape = _pooled_shape("global_avg_pool_dequantize", q, multiplier, x_zero_point, keepdim)
    return q.new_empty(shape, dtype=torch.float32)


@library.register(
    "global_avg_pool_dequantize(Tensor q, float multiplier, int x_zero_point, bool keepdim) -> Tensor",
    _fake_global_avg_pool_dequantize,
)
def global_avg_pool_dequantize(
    q: Tensor, multiplier: float, x_zero_point: int, keepdim: bool
) -> Tensor:
    """``float32(sum (q - x_zp)) * float32(multiplier / (H * W))``: the mean in float, ``multiplier`` q's scale."""
    _fake_global_avg_pool_dequantize(q, multiplier, x_zero_point, keepdim)
    return _total(q, x_zero_point, keepdim).to(torch.float32) * _factor(q, multiplier)
