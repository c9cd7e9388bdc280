"""Operators that TVM gets wrong or lacks, many in one compiled model, against eager PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphopt as go
from tests.end_to_end.support import compiled

Operator = Callable[[Tensor], Any]
NAN = float("nan")


class Many(nn.Module):
    """Every operator on the input, and on the result of a convolution, which lies in a layout of ours."""

    def __init__(self, operators: Sequence[Operator], channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(channels, channels, 1)
        self._operators = tuple(operators)

    def forward(self, x: Tensor) -> Any:
        y = self.convolution(x)
        return [operator(value) for operator in self._operators for value in (x, y)]


def _resize(mode: str, **options: Any) -> Operator:
    return lambda x: F.interpolate(x, mode=mode, **options)


def _with_nan(operator: Operator) -> Operator:
    return lambda x: operator(torch.where(x.abs() < 0.3, NAN, x))


GROUPS: dict[str, list[Operator]] = {
    "activations": [
        F.selu,
        lambda x: F.celu(x, 0.6),
        lambda x: F.elu(x, 0.7),
        F.mish,
        lambda x: F.softplus(x * 5, 2, 3),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.hardtanh(x, -0.5, 0.7),
        F.logsigmoid,
    ],
    "arithmetic": [
        lambda x: torch.add(x, x.flip(2), alpha=3),
        lambda x: torch.sub(x, x.flip(2), alpha=2),
        lambda x: torch.hypot(x, x.flip(2)),
        lambda x: torch.logaddexp(x, x.flip(2)),
        torch.exp2,
        lambda x: torch.div(x, 0.3, rounding_mode="floor"),
        lambda x: torch.remainder(x, -0.7),
        lambda x: torch.round(torch.round(x * 4) / 2),
    ],
    "nearest": [
        _resize("nearest", scale_factor=1.5),
        _resize("nearest", size=(9, 4)),
        _resize("nearest", size=(3, 2)),
        _resize("nearest-exact", size=(9, 4)),
    ],
    "linear": [
        _resize("bilinear", scale_factor=1.7),
        _resize("bilinear", size=(9, 11), align_corners=True),
        _resize("bilinear", size=(3, 2), antialias=True),
        _resize("bilinear", size=(1, 1)),
    ],
    "cubic": [
        _resize("bicubic", size=(1, 1)),
        _resize("bicubic", size=(9, 4), align_corners=True),
    ],
    "average pools": [
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
        lambda x: F.avg_pool2d(x[0], 3, 2, 1, count_include_pad=False),
        lambda x: F.avg_pool3d(x, 3, 2, 1, divisor_override=4),
    ],
    "maximum pools": [
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.adaptive_max_pool2d(x, (3, 2)),
        lambda x: F.max_pool2d(x - 9, 3, 2, 1, dilation=2) if x.shape[2] > 4 else x,
    ],
    "selection": [
        lambda x: x[:, -1],
        lambda x: x[:, [4, 0, 2]],
        lambda x: x[:, torch.tensor([-1, 0])],
        lambda x: x[:, :, torch.tensor([0, -1]), torch.tensor([1, 2])],
        lambda x: x.unfold(2, 3, 2),
        lambda x: F.unfold(x, 3, padding=1),
        lambda x: x.roll((1, -2), (2, 3)),
    ],
    "extremes": [
        lambda x: x.amax((2, 3)),
        lambda x: x.amin(1, keepdim=True),
        lambda x: x.round().max(1),
        lambda x: x.round().min(2, keepdim=True),
        lambda x: x.round().argmax(1),
        lambda x: (x > 2).any(),
        lambda x: x.logsumexp(1),
    ],
    "extremes of NaN": [
        _with_nan(lambda x: x.argmax(1)),
        _with_nan(lambda x: x.argmin(2)),
        _with_nan(lambda x: x.max(1)),
        _with_nan(lambda x: x.amin((1, 2))),
    ],
    "reductions": [
        lambda x: x.mean(dim=()),
        lambda x: torch.var_mean(x, 1),
        lambda x: x.prod(1),
        lambda x: (x > 0).cumsum(1),
        lambda x: x.relu().norm(p=0, dim=1),
        lambda x: x.std((2, 3), correction=0),
        lambda x: F.group_norm(x, 2),
    ],
}


def _check(ours: Any, single: Tensor, double: Tensor) -> None:
    """Within four times the error of eager float32 and 1e-5 of the largest element; other types are equal."""
    eager, exact = single.numpy(), double.numpy()
    assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
    if not np.issubdtype(eager.dtype, np.floating):
        assert np.array_equal(ours, eager)
        return
    assert np.array_equal(np.isnan(ours), np.isnan(eager))
    error, truth = (np.nan_to_num(np.abs(v)) for v in (eager - exact, exact))
    assert np.nan_to_num(np.abs(ours - exact)).max() <= 4 * error.max() + 1e-5 * truth.max()


@pytest.mark.parametrize("group", GROUPS)
def test_group(group: str) -> None:
    x = torch.randn((2, 6, 7, 5), generator=torch.Generator().manual_seed(0))
    model = Many(GROUPS[group], 6).eval()
    ours = compiled(go.capture(model, (x,))).session()(x.numpy())
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    leaves = map(pytree.tree_leaves, (ours, single, double))
    for values in zip(*leaves, strict=True):
        _check(*values)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (torch.erfinv, "neither graphopt nor TVM has a form of it"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "TVM gives float32 for int64"),
        (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)), "TVM gives the shape"),
    ],
)
def test_refused_by_name(operator: Operator, message: str) -> None:
    """What no form is right for is an error that names the operator, never a wrong result."""
    x = torch.randn((2, 6, 7, 5), generator=torch.Generator().manual_seed(0))
    program = go.capture(Many([operator], 6).eval(), (x,))
    with pytest.raises(go.GraphoptError, match=f"operator .* cannot be lowered: .*{message}"):
        compiled(program)
