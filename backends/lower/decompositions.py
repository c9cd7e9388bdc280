"""What TVM has no form of, or a wrong one, in terms of operators that it gets right.

Applied beside PyTorch's own table when the emitted graph is decomposed to core ATen. A function returns
``NotImplemented`` where the call can stay as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.lower.step import pair

aten = torch.ops.aten


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """``scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1))``; TVM drops both scales."""
    negative = torch.expm1(torch.clamp(x * input_scale, max=0.0)) * alpha
    return torch.where(x > 0, x, negative) * scale


def _add(x: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """TVM drops ``alpha``."""
    return NotImplemented if alpha == 1 else x + other * alpha


def _sub(x: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else x - other * alpha


def _select(x: Tensor, dim: int, index: int) -> Any:
    """TVM reads before the tensor for a negative index."""
    if not isinstance(index, int) or index >= 0:
        return NotImplemented
    return aten.select.int(x, dim, x.shape[dim] + index)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """One index is a gather along its dimension, negative ones counted from the end."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in given):
        return NotImplemented
    if len(given) == 1:
        dim, index = given[0]
        rows = x.index_select(dim, _wrapped(index, x.shape[dim]).reshape(-1))
        return rows.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    dims = [dim for dim, _ in given]
    if dims != list(range(dims[0], dims[-1] + 1)):
        return NotImplemented
    return _index_together(x, dims, [index for _, index in given])


def _index_together(x: Tensor, dims: list[int], indices: list[Tensor]) -> Tensor:
    """Neighbouring dimensions become one, and their indices one index into it."""
    first, last = dims[0], dims[-1]
    flat: Any = 0
    for dim, index in zip(dims, indices, strict=True):
        flat = flat * x.shape[dim] + _wrapped(index, x.shape[dim])
    merged = x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])
    rows = merged.index_select(first, flat.reshape(-1))
    return rows.reshape(*x.shape[:first], *flat.shape, *x.shape[last + 1 :])


def _wrapped(index: Tensor, size: Any) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if not dim else list(dim)
    return torch.var(x, dims, correction=correction, keepdim=keepdim), x.mean(dims, keepdim)


def _prod(x: Tensor, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    last = torch.cumprod(x, dim).narrow(dim, x.shape[dim] - 1, 1)
    return last if keepdim else last.squeeze(dim)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """No dimension means all of them; TVM then averages over none."""
    if dim is None or len(dim):
        return NotImplemented
    return aten.mean.dim(x, list(range(x.dim())), keepdim, dtype=dtype)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Any:
    channels = x.shape[1]
    rows = x.reshape(x.shape[0], groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    shape = [1, channels, *[1] * (x.dim() - 2)]
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _any(x: Tensor) -> Tensor:
    return torch.amax(x.to(torch.float32)) > 0


def _cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Any:
    """PyTorch counts in int64 what is bool; TVM cannot sum bools."""
    return (
        NotImplemented
        if x.dtype != torch.bool
        else aten.cumsum.default(x.to(dtype or torch.int64), dim)
    )


def _vector_norm(
    x: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """The 0-norm counts; TVM divides by the order."""
    if order != 0:
        return NotImplemented
    dims = list(range(x.dim())) if dim is None else dim
    return (x != 0).to(dtype or x.dtype).sum(dims, keepdim)


def _exp2(x: Tensor) -> Tensor:
    return torch.pow(2.0, x)


def _logaddexp(x: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(x, other) + torch.log1p(torch.exp(-torch.abs(x - other)))


def _hypot(x: Tensor, other: Tensor) -> Tensor:
    return torch.sqrt(x * x + other * other)


def _addbmm(
    x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return x * beta + torch.bmm(batch1, batch2).sum(0) * alpha


def _im2col(x: Tensor, kernel: Sequence[int], dilation: Any, padding: Any, stride: Any) -> Tensor:
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = map(pair, (kernel, dilation, padding, stride))
    padded = aten.constant_pad_nd.default(x, [pw, pw, ph, ph], 0.0)
    rows = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    windows = [
        padded[
            :, :, top : top + (rows - 1) * sh + 1 : sh, left : left + (columns - 1) * sw + 1 : sw
        ]
        for top in range(0, kh * dh, dh)
        for left in range(0, kw * dw, dw)
    ]
    return torch.stack(windows, 2).reshape(x.shape[0], x.shape[1] * kh * kw, rows * columns)


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Every window as its elements, one slice an element."""
    count = (x.shape[dim] - size) // step + 1
    parts = [
        aten.slice.Tensor(x, dim, start, start + (count - 1) * step + 1, step)
        for start in range(size)
    ]
    return torch.stack(parts, -1)


def _adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maximum over a rectangle, one dimension after the other; the indices are not computed."""
    for dim, wanted in zip((x.dim() - 2, x.dim() - 1), output_size, strict=True):
        size = x.shape[dim]
        windows = [
            (cell * size // wanted, math.ceil((cell + 1) * size / wanted)) for cell in range(wanted)
        ]
        parts = [torch.amax(x.narrow(dim, a, b - a), [dim], keepdim=True) for a, b in windows]
        x = torch.cat(parts, dim)
    return x, torch.zeros_like(x, dtype=torch.int64)


def _avg_pool3d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    """TVM drops ``divisor_override``."""
    if divisor is None:
        return NotImplemented
    maps = x if x.dim() == 5 else x.unsqueeze(0)
    mean = aten.avg_pool3d.default(maps, kernel, stride, padding, ceil_mode, True)
    mean = mean if x.dim() == 5 else mean.squeeze(0)
    size = math.prod(kernel) if len(kernel) == 3 else kernel[0] ** 3
    return mean * (size / divisor)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.elu.default: _elu,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.var_mean.correction: _var_mean,
    aten.prod.dim_int: _prod,
    aten.mean.dim: _mean,
    aten.group_norm.default: _group_norm,
    aten.any.default: _any,
    aten.cumsum.default: _cumsum,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.exp2.default: _exp2,
    aten.logaddexp.default: _logaddexp,
    aten.hypot.default: _hypot,
    aten.addbmm.default: _addbmm,
    aten.im2col.default: _im2col,
    aten.unfold.default: _unfold,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.avg_pool3d.default: _avg_pool3d,
}


def table() -> Any:
    """PyTorch's decompositions to core ATen with ours in their place."""
    known = torch.export.default_decompositions()
    known.update(TABLE)  # type: ignore[no-untyped-call]
    return known
