"""float32 convolution, run by the interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue
from graphopt.backends.cuda import float_conv as float_conv_module
from graphopt.backends.cuda.float_conv import LARGE, SMALL, float_conv, pack_float, tile_of
from tests.backends.cuda.harness import Array, image, logical, stored, to_torch
from tests.backends.cuda.simt import run


def _workload(
    channels: tuple[int, int],
    size: tuple[int, int] = (6, 5),
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
    batch: int | None = 2,
) -> Conv2d:
    out = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in size]
    return Conv2d(
        x=image(batch, size, channels[0], "float32"),
        y=image(batch, (out[0], out[1]), channels[1], "float32"),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        groups=groups,
    )


@pytest.mark.parametrize(
    "workload",
    [
        _workload((3, 70)),
        _workload((20, 8), kernel=1, padding=0, stride=2),
        _workload((5, 6), dilation=2, padding=2, batch=None),
        _workload((12, 12), groups=12),
        _workload((8, 12), groups=4, stride=2),
        _workload((5, 150), size=(9, 8), stride=2),
    ],
    ids=["rgb", "point", "dilated", "depthwise", "grouped", "wide"],
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("few_blocks", [float_conv_module._FEW_BLOCKS, 1])
def test_equals_torch(
    workload: Conv2d, fused: bool, few_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with large tiles wherever there are channels for them."""
    monkeypatch.setattr(float_conv_module, "_FEW_BLOCKS", few_blocks)
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    x, y, w = workload.x, workload.y, workload
    if fused:
        w = replace(
            w, residual=y, epilogue=Epilogue(float_residual=True, activation=Activation("relu"))
        )
    weight = normal(y.channels, x.channels // w.groups, *w.kernel)
    bias = normal(y.channels) if fused else None
    values, other = (
        normal(2, x.height, x.width, x.channels),
        normal(2, y.height, y.width, y.channels),
    )
    result = stored(y, 2, np.zeros_like(other), rng)
    residual = [other] if fused else []
    run(float_conv(w), values, *pack_float(w, weight, bias), *residual, result)
    want = torch.nn.functional.conv2d(
        to_torch(values),
        torch.from_numpy(weight),
        None if bias is None else torch.from_numpy(bias),
        w.stride,
        w.padding,
        w.dilation,
        w.groups,
    )
    if fused:
        want = (want + to_torch(other)).relu()
    expected = want.numpy().transpose(0, 2, 3, 1)
    # at most 27 products of about 1, added in another order
    np.testing.assert_allclose(logical(y, result), expected, rtol=0, atol=2e-5)


def test_tiles() -> None:
    """Of 128 x 128 outputs where there are enough of them, and channels for more than a half."""
    many = _workload((16, 128), size=(56, 56), batch=8)
    assert tile_of(many) == LARGE
    assert tile_of(replace(many, y=replace(many.y, batch=None))) == LARGE
    assert tile_of(_workload((16, 64), size=(56, 56), batch=8)) == SMALL
    assert tile_of(_workload((16, 128), size=(14, 14), batch=8)) == SMALL
