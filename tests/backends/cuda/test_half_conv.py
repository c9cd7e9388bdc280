"""Depthwise and grouped convolution and batch norms on float16, run by the interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue
from graphopt.backends.cuda.half_conv import half_conv, pack_half
from tests.backends.cuda.harness import Array, image, in_fours, logical, stored, to_torch
from tests.backends.cuda.simt import run


def _workload(
    channels: tuple[int, int],
    groups: int,
    size: tuple[int, int] = (7, 5),
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    batch: int | None = 2,
    dtypes: tuple[str, str] = ("float16", "float16"),
) -> Conv2d:
    out = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in size]
    strides = [in_fours(c) if d == "float16" else c for c, d in zip(channels, dtypes, strict=True)]
    return Conv2d(
        x=image(batch, size, channels[0], dtypes[0], channel_stride=strides[0]),
        y=image(batch, (out[0], out[1]), channels[1], dtypes[1], channel_stride=strides[1]),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        groups=groups,
    )


@pytest.mark.parametrize(
    ("workload", "weight_dtype"),
    [
        (_workload((8, 8), 8), "float16"),
        (_workload((5, 5), 5, stride=2, kernel=5, padding=2), "float16"),
        (_workload((6, 6), 6, dilation=2, padding=2, batch=None), "float16"),
        (_workload((7, 7), 7, kernel=1, padding=0), "float32"),
        (_workload((8, 8), 8, dtypes=("float16", "float32")), "float16"),
        (_workload((16, 8), 2, stride=2), "float16"),
        (_workload((6, 15), 3), "float16"),
        (_workload((3, 6), 1, batch=None), "float16"),
        (_workload((1, 1), 1, size=(4, 4)), "float16"),
    ],
    ids=["depthwise", "odd", "dilated", "norm", "widened", "grouped", "thirds", "rgb", "one"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_equals_torch(workload: Conv2d, weight_dtype: str, fused: bool) -> None:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float16)

    x, y, w = workload.x, workload.y, workload
    if fused:
        activation = Activation("hard_swish")
        w = replace(w, residual=y, epilogue=Epilogue(float_residual=True, activation=activation))
    weight = normal(y.channels, x.channels // w.groups, *w.kernel).astype(np.float32)
    bias = normal(y.channels).astype(np.float32) if fused else None
    values = normal(2, x.height, x.width, x.channels)
    other = normal(2, y.height, y.width, y.channels).astype(y.dtype)
    result = np.full((2, *y.shape), np.nan, y.dtype)
    given = [stored(x, 2, values, rng), *pack_half(w, weight, bias, weight_dtype)]
    residual = [stored(y, 2, other, rng)] if fused else []
    run(half_conv(w, weight_dtype), *given, *residual, result)
    want = torch.nn.functional.conv2d(
        to_torch(values.astype(np.float64)),
        torch.from_numpy(weight).double(),
        None if bias is None else torch.from_numpy(bias).double(),
        w.stride,
        w.padding,
        w.dilation,
        w.groups,
    )
    if fused:
        want = torch.nn.functional.hardswish(want + to_torch(other.astype(np.float64)))
    expected = want.numpy().transpose(0, 2, 3, 1)
    # 72 products of about 1 added in float32, then one rounding to float16
    unit = 2.0**-11 if y.dtype == "float16" else 0.0
    np.testing.assert_allclose(logical(y, result), expected, rtol=unit, atol=2e-5)
