"""Workloads, their definition in PyTorch, and kernels run by the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import graphopt.integer  # noqa: F401 - defines torch.ops.graphopt
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout
from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_pack import pack_conv, pack_depthwise, pack_dot
from graphopt.backends.cuda.conv_plan import Tile, plan_conv
from graphopt.backends.cuda.depthwise import depthwise
from graphopt.backends.cuda.dot import dot_conv
from tests.backends.cpu.conv_harness import REQUANTIZE, RESIDUAL_ADD
from tests.backends.cuda.simt import run

Array = np.ndarray[Any, Any]

AMPERE = ARCHS["sm_80"]


def in_fours(channels: int) -> int:
    return -(-channels // 4) * 4


def image(
    batch: int | None, size: tuple[int, int], channels: int, dtype: str = "uint8", **more: Any
) -> Layout:
    """An activation as the lowering lays it out: bytes in whole fours."""
    of_bytes = dtype in ("uint8", "int8")
    stride = more.pop("channel_stride", in_fours(channels) if of_bytes else channels)
    return Layout(batch, *size, channels, dtype, channel_stride=stride, **more)


def conv_workload(
    channels: tuple[int, int],
    size: tuple[int, int] = (5, 6),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    batch: int | None = 2,
    residual: bool = False,
    floats: bool = False,
    dtype: str = "uint8",
    x_zero_point: int = 11,
    x_more: dict[str, Any] | None = None,
    y_more: dict[str, Any] | None = None,
) -> Conv2d:
    """A consistent workload; ``x_more`` and ``y_more`` are fields of the layouts, ``dtype`` is every activation's."""
    out = (
        (size[0] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (size[1] + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )
    requantize, add = REQUANTIZE, RESIDUAL_ADD
    if dtype == "int8":
        requantize = replace(requantize, zero_point=-9, qmin=-128, qmax=127)
        add = replace(add, a_zero_point=-9, b_zero_point=-20, zero_point=4, qmin=-128, qmax=127)
    epilogue = Epilogue(
        requantize=None if floats else requantize, residual_add=add if residual else None
    )
    y = image(batch, out, channels[1], "float32" if floats else dtype, **(y_more or {}))
    return Conv2d(
        x=image(batch, size, channels[0], dtype, **(x_more or {})),
        y=y,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        x_zero_point=x_zero_point,
        epilogue=epilogue,
        residual=image(batch, out, channels[1], dtype) if residual else None,
    )


def any_bytes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """The whole range of a type of one byte."""
    return rng.integers(0, 256, shape).astype(np.uint8).view(dtype)


def stored(layout: Layout, batch: int, values: Array, rng: np.random.Generator) -> Array:
    """``[N, H, W, C]`` values as they lie in memory, whatever stands beside them."""
    shape = (batch, *layout.shape)
    if layout.dtype.startswith("float"):
        memory = rng.standard_normal(shape).astype(layout.dtype)
    else:
        memory = any_bytes(rng, shape, layout.dtype)
    first = layout.first_channel
    memory[..., first : first + layout.channels] = values
    return memory


def logical(layout: Layout, memory: Array) -> Array:
    """The channels of a layout, ``[N, H, W, C]``."""
    return memory[..., layout.first_channel : layout.first_channel + layout.channels]


def to_torch(values: Array) -> torch.Tensor:
    """NHWC as NCHW."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


CONV_SHAPES = {
    "rgb": conv_workload((3, 9), size=(9, 7), stride=(2, 2)),
    "grey": conv_workload((1, 33), size=(6, 5), kernel=(5, 3), padding=(2, 1)),
    "tall": conv_workload((10, 33), size=(6, 5), kernel=(5, 3), padding=(2, 1)),
    "point": conv_workload((80, 17), kernel=(1, 1), padding=(0, 0)),
    "dilated": conv_workload((16, 16), dilation=(2, 1), padding=(2, 1)),
    "strided": conv_workload((24, 8), size=(7, 8), stride=(1, 2), padding=(0, 1)),
    "slice-in": conv_workload(
        (8, 12), x_more={"channel_stride": 24, "first_channel": 8, "shared": True}
    ),
    "slice-out": conv_workload(
        (8, 12), y_more={"channel_stride": 32, "first_channel": 4, "shared": True}
    ),
    "odd-out": conv_workload((64, 33), kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "tokens": conv_workload((8, 5), size=(1, 21), kernel=(1, 1), padding=(0, 0)),
}


class ConvCase:
    """A workload with random data, and what the definition makes of it."""

    def __init__(self, workload: Conv2d, batch: int = 2, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.workload, self.rng, self.batch = workload, rng, batch
        x, y = workload.x, workload.y
        shape = (y.channels, x.channels // workload.groups, *workload.kernel)
        self.weight = rng.integers(-127, 128, shape).astype(np.int8)
        self.bias = rng.integers(-2000, 2000, y.channels).astype(np.int32)
        depth = int(np.prod(shape[1:]))
        # about a quarter of the outputs saturate
        scale = 80.0 / (5000.0 * depth**0.5)
        self.multiplier = (rng.uniform(0.5, 2.0, y.channels) * scale).astype(np.float32)
        self.x = any_bytes(rng, (batch, x.height, x.width, x.channels), x.dtype)
        self.residual = any_bytes(rng, (batch, y.height, y.width, y.channels), x.dtype)

    def expected(self) -> Array:
        w = self.workload
        top, left = w.padding
        parts = [
            to_torch(self.x),
            *map(torch.from_numpy, (self.weight, self.bias, self.multiplier)),
        ]
        bottom = (
            (w.y.height - 1) * w.stride[0]
            - top
            + (w.kernel[0] - 1) * w.dilation[0]
            - (w.x.height - 1)
        )
        right = (
            (w.y.width - 1) * w.stride[1]
            - left
            + (w.kernel[1] - 1) * w.dilation[1]
            - (w.x.width - 1)
        )
        padding = [top, left, max(bottom, 0), max(right, 0)]
        shape = (list(w.stride), padding, list(w.dilation), w.groups, w.x_zero_point)
        first = w.epilogue.requantize
        if first is None:
            result = torch.ops.graphopt.conv2d_dequantize(*parts, *shape)
        else:
            result = torch.ops.graphopt.conv2d(
                *parts, *shape, first.zero_point, first.qmin, first.qmax
            )
        add = w.epilogue.residual_add
        if add is not None:
            multipliers = (add.a_multiplier, add.b_multiplier, add.shift)
            points = (add.a_zero_point, add.b_zero_point, add.zero_point, add.qmin, add.qmax)
            other = to_torch(self.residual)
            result = torch.ops.graphopt.add(result, other, *multipliers, *points)
        found: Array = result.numpy().transpose(0, 2, 3, 1)
        return found

    def _run(self, function: Any, packed: list[Array], asynchronous: bool = True) -> Array:
        w = self.workload
        x = stored(w.x, self.batch, self.x, self.rng)
        y = np.full((self.batch, *w.y.shape), 0x5A, w.y.dtype)
        others = []
        if w.residual is not None:
            others = [stored(w.residual, self.batch, self.residual, self.rng)]
        before = y.copy()
        run(function, x, *packed, *others, y, asynchronous=asynchronous)
        if w.y.shared:  # the neighbours' channels are theirs
            ours = slice(w.y.first_channel, w.y.first_channel + w.y.channels)
            before[..., ours] = y[..., ours]
            assert (before == y).all()
        return logical(w.y, y)

    def by_tensor_cores(self, tile: Tile | None = None, arch: Arch = AMPERE) -> Array:
        plan = plan_conv(self.workload, arch, tile)
        packed = pack_conv(plan, self.weight, self.bias, self.multiplier)
        return self._run(conv(plan, arch), packed, arch.async_copy)

    def by_dot(self) -> Array:
        w = self.workload
        packed = pack_dot(self.weight, self.bias, self.multiplier, w.x_zero_point, w.groups)
        return self._run(dot_conv(w), packed)

    def by_depthwise(self) -> Array:
        w = self.workload
        packed = pack_depthwise(self.weight, self.bias, self.multiplier, w.x_zero_point)
        return self._run(depthwise(w), packed)
