"""``graphopt::conv2d`` and ``graphopt::linear``, with their ``_dequantize`` forms: exact int32 accumulation, one rescale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from graphopt.integer import arithmetic, library


def _check_parameters(op: str, weight: Tensor, bias: Tensor, multiplier: Tensor) -> None:
    """int8 weight [O, ...], int32 bias [O], float32 multiplier [O]."""
    library.require(weight.dtype == torch.int8, op, "weight", f"int8, not {weight.dtype}")
    library.require(bias.dtype == torch.int32, op, "bias", f"int32, not {bias.dtype}")
    is_float = multiplier.dtype == torch.float32
    library.require(is_float, op, "multiplier", f"float32, not {multiplier.dtype}")
    shape = (weight.shape[0],)
    library.require(tuple(bias.shape) == shape, op, "bias", f"of shape {shape}")
    library.require(tuple(multiplier.shape) == shape, op, "multiplier", f"of shape {shape}")


def _check_values(op: str, weight: Tensor, bias: Tensor, multiplier: Tensor) -> None:
    """What only real tensors can tell: accumulators fit int32, multipliers are finite and positive."""
    arithmetic.check_accumulator(weight, bias)
    usable = torch.isfinite(multiplier) & (multiplier > 0)
    library.require(bool(usable.all()), op, "every multiplier", "finite and positive")


def _windows(size: Any, kernel: int, stride: int, before: int, after: int, dilation: int) -> Any:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _convolution_output(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Any, ...]:
    """The shape ``[N, O, P, Q]``. Raises IntegerizeError for arguments that do not fit each other."""
    library.require(x.dim() == 4, op, "x", f"[N, C, H, W], not of rank {x.dim()}")
    library.require(weight.dim() == 4, op, "weight", f"[O, I, kH, kW], not of rank {weight.dim()}")
    library.require(len(stride) == 2 and min(stride) > 0, op, "stride", "two positive numbers")
    library.require(
        len(dilation) == 2 and min(dilation) > 0, op, "dilation", "two positive numbers"
    )
    needs = "(top, left, bottom, right), none negative"
    library.require(len(padding) == 4 and min(padding) >= 0, op, "padding", needs)
    channels = weight.shape[1] * groups
    divides = groups > 0 and weight.shape[0] % groups == 0
    library.require(divides, op, "groups", f"a divisor of {weight.shape[0]}, not {groups}")
    library.require(x.shape[1] == channels, op, "x", f"of {channels} channels, not {x.shape[1]}")
    sizes = [
        _windows(
            x.shape[2 + axis],
            weight.shape[2 + axis],
            stride[axis],
            padding[axis],
            padding[axis + 2],
            dilation[axis],
        )
        for axis in (0, 1)
    ]
    library.require(sizes[0] > 0 and sizes[1] > 0, op, "the padded x", "as large as the kernel")
    return (x.shape[0], weight.shape[0], *sizes)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
) -> Tensor:
    """``sum (x - x_zp) * w + bias`` in int32; float64 carries it exactly, every partial sum being below 2**31."""
    centred = arithmetic.centre(x, x_zero_point).to(torch.float64)
    top, left, bottom, right = padding
    centred = functional.pad(centred, (left, right, top, bottom))
    acc = functional.conv2d(
        centred, weight.to(torch.float64), None, list(stride), 0, list(dilation), groups
    )
    return acc.to(torch.int32) + bias.reshape(1, -1, 1, 1)


def _fake_conv2d_dequantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
) -> Tensor:
    op = "conv2d_dequantize"
    library.check_quantized(op, "x", x, x_zero_point)
    _check_parameters(op, weight, bias, multiplier)
    shape = _convolution_output(op, x, weight, stride, padding, dilation, groups)
    return x.new_empty(shape, dtype=torch.float32)


@library.register(
    "conv2d_dequantize(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int[] stride, int[] padding, "
    "int[] dilation, int groups, int x_zero_point) -> Tensor",
    _fake_conv2d_dequantize,
)
def conv2d_dequantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
) -> Tensor:
    """``float32(sum (x - x_zp) * w + bias) * multiplier[o]``; the padding (top, left, bottom, right) holds ``x_zp``."""
    _fake_conv2d_dequantize(
        x, weight, bias, multiplier, stride, padding, dilation, groups, x_zero_point
    )
    _check_values("conv2d_dequantize", weight, bias, multiplier)
    acc = _convolve(x, weight, bias, stride, padding, dilation, groups, x_zero_point)
    return (acc.to(torch.float32) * multiplier.reshape(1, -1, 1, 1)).contiguous()


def _fake_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    library.check_quantized("conv2d", "x", x, x_zero_point)
    _check_parameters("conv2d", weight, bias, multiplier)
    dtype = library.output_dtype("conv2d", y_zero_point, qmin, qmax)
    shape = _convolution_output("conv2d", x, weight, stride, padding, dilation, groups)
    return x.new_empty(shape, dtype=dtype)


@library.register(
    "conv2d(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int[] stride, int[] padding, int[] dilation, "
    "int groups, int x_zero_point, int y_zero_point, int qmin, int qmax) -> Tensor",
    _fake_conv2d,
)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """``y_zp + rint(clamp(float32(sum (x - x_zp) * w + bias) * multiplier[o], qmin - y_zp, qmax - y_zp))``."""
    arguments = (stride, padding, dilation, groups, x_zero_point)
    _fake_conv2d(x, weight, bias, multiplier, *arguments, y_zero_point, qmin, qmax)
    _check_values("conv2d", weight, bias, multiplier)
    acc = _convolve(x, weight, bias, *arguments)
    return arithmetic.rescale(acc, multiplier.reshape(1, -1, 1, 1), y_zero_point, qmin, qmax)


def _linear_output(op: str, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    library.require(weight.dim() == 2, op, "weight", f"[O, K], not of rank {weight.dim()}")
    library.require(x.dim() >= 1, op, "x", "[..., K], not a scalar")
    features = weight.shape[1]
    library.require(x.shape[-1] == features, op, "x", f"of {features} features, not {x.shape[-1]}")
    return (*x.shape[:-1], weight.shape[0])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor, x_zero_point: int) -> Tensor:
    centred = arithmetic.centre(x, x_zero_point).to(torch.float64)
    return (centred @ weight.to(torch.float64).T).to(torch.int32) + bias


def _fake_linear_dequantize(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, x_zero_point: int
) -> Tensor:
    library.check_quantized("linear_dequantize", "x", x, x_zero_point)
    _check_parameters("linear_dequantize", weight, bias, multiplier)
    return x.new_empty(_linear_output("linear_dequantize", x, weight), dtype=torch.float32)


@library.register(
    "linear_dequantize(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int x_zero_point) -> Tensor",
    _fake_linear_dequantize,
)
def linear_dequantize(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, x_zero_point: int
) -> Tensor:
    """``float32(sum_k (x[..., k] - x_zp) * w[o, k] + bias[o]) * multiplier[o]``."""
    _fake_linear_dequantize(x, weight, bias, multiplier, x_zero_point)
    _check_values("linear_dequantize", weight, bias, multiplier)
    return _multiply(x, weight, bias, x_zero_point).to(torch.float32) * multiplier


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    library.check_quantized("linear", "x", x, x_zero_point)
    _check_parameters("linear", weight, bias, multiplier)
    dtype = library.output_dtype("linear", y_zero_point, qmin, qmax)
    return x.new_empty(_linear_output("linear", x, weight), dtype=dtype)


@library.register(
    "linear(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int x_zero_point, int y_zero_point, int qmin, "
    "int qmax) -> Tensor",
    _fake_linear,
)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """``y_zp + rint(clamp(float32(sum_k (x - x_zp) * w[o, k] + bias[o]) * multiplier[o], qmin - y_zp, qmax - y_zp))``."""
    _fake_linear(x, weight, bias, multiplier, x_zero_point, y_zero_point, qmin, qmax)
    _check_values("linear", weight, bias, multiplier)
    acc = _multiply(x, weight, bias, x_zero_point)
    return arithmetic.rescale(acc, multiplier, y_zero_point, qmin, qmax)
