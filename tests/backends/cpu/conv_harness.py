"""The definition of a convolution with its epilogue, in torch and NumPy, and random workloads to compare kernels with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphopt.backends.cpu.conv import conv2d, pack_conv2d
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout, QuantizedAdd, Requantize
from tests.backends.cpu.stream_harness import pack, round_and_clamp, run

REQUANTIZE = Requantize(zero_point=3, qmin=0, qmax=255)
RESIDUAL_ADD = QuantizedAdd(
    a_multiplier=700_001,
    b_multiplier=-300_007,
    shift=20,
    a_zero_point=3,
    b_zero_point=9,
    zero_point=101,
    qmin=5,
    qmax=250,
)


def conv_workload(
    channels: tuple[int, int],
    size: tuple[int, int] = (7, 7),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: str = "uint8",
    out_dtype: str | None = None,
    epilogue: Epilogue | None = None,
    batch: int | None = 1,
    x_channel_stride: int = 0,
    y_margin: int = 0,
    y_channel_stride: int = 0,
    x_extra: int = 0,
) -> Conv2d:
    """A consistent workload: the input has just the margins its windows touch, plus ``x_extra``."""
    integer = dtype == "uint8"
    if epilogue is None:
        epilogue = Epilogue(requantize=REQUANTIZE if integer else None)
    out_dtype = out_dtype or ("uint8" if epilogue.requantize else "float32")
    out = [
        (extent + 2 * pad - d * (k - 1) - 1) // s + 1
        for extent, pad, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    top, left = padding[0] + x_extra, padding[1] + x_extra
    zero_point = 11 if integer else 0
    x = Layout(batch, *size, channels[0], dtype, top, top, left, left, x_channel_stride, zero_point)
    margins = (y_margin, y_margin + 1, y_margin + 2, y_margin) if y_margin else (0, 0, 0, 0)
    fill = 77 if integer else 0
    y = Layout(batch, out[0], out[1], channels[1], out_dtype, *margins, y_channel_stride, fill)
    residual = None
    if epilogue.residual_add or epilogue.float_residual:
        residual = Layout(batch, out[0], out[1], channels[1], out_dtype, 1, 0, 0, 2)
    return Conv2d(x, y, kernel, stride, padding, dilation, groups, zero_point, epilogue, residual)


@dataclass(frozen=True)
class Data:
    """Logical arguments of a workload."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray
    residual: np.ndarray


def random_data(workload: Conv2d, seed: int = 0, batch: int = 1) -> Data:
    """Bytes over their whole ranges; multipliers that spread the results over and a little beyond 0..255."""
    generator = np.random.default_rng(seed)
    x, y = workload.x, workload.y
    shape = (x.batch or batch, x.channels, x.height, x.width)
    out = (x.batch or batch, y.channels, y.height, y.width)
    taps = (y.channels, x.channels // workload.groups, *workload.kernel)
    depth = int(np.prod(taps[1:]))
    if x.dtype == "float32":
        return Data(
            generator.standard_normal(shape).astype(np.float32),
            (generator.standard_normal(taps) / np.sqrt(depth)).astype(np.float32),
            generator.standard_normal(y.channels).astype(np.float32),
            np.ones(y.channels, np.float32),
            generator.standard_normal(out).astype(np.float32),
        )
    spread = 128 * 74 * np.sqrt(depth)
    residual = generator.integers(0, 256, out).astype(np.uint8)
    if workload.epilogue.float_residual:
        residual = generator.standard_normal(out).astype(np.float32)
    return Data(
        generator.integers(0, 256, shape).astype(np.uint8),
        generator.integers(-128, 128, taps).astype(np.int8),
        generator.integers(-5000, 5000, y.channels).astype(np.int32),
        (generator.uniform(30, 120, y.channels) / spread).astype(np.float32),
        residual,
    )


def accumulate(workload: Conv2d, data: Data) -> np.ndarray:
    """``sum (x - x_zero_point) * w + bias`` in float64: exact for integers, the float reference otherwise."""
    x = torch.from_numpy(data.x.astype(np.float64) - workload.x_zero_point)
    (kh, kw), (dh, dw) = workload.kernel, workload.dilation
    (sh, sw), (top, left) = workload.stride, workload.padding
    below = (workload.y.height - 1) * sh - top + (kh - 1) * dh + 1 - workload.x.height
    right = (workload.y.width - 1) * sw - left + (kw - 1) * dw + 1 - workload.x.width
    x = torch.nn.functional.pad(x, (left, max(right, 0), top, max(below, 0)))
    out = torch.nn.functional.conv2d(
        x,
        torch.from_numpy(data.weight.astype(np.float64)),
        torch.from_numpy(data.bias.astype(np.float64)),
        workload.stride,
        0,
        workload.dilation,
        workload.groups,
    )
    return out[:, :, : workload.y.height, : workload.y.width].numpy()


def reference(workload: Conv2d, data: Data) -> np.ndarray:
    """The logical output up to, and without, a float activation."""
    accumulator = accumulate(workload, data)
    epilogue = workload.epilogue
    if workload.x.dtype == "float32":
        return accumulator + data.residual if epilogue.float_residual else accumulator
    value: np.ndarray = (
        accumulator.astype(np.int32).astype(np.float32) * data.multiplier[None, :, None, None]
    )
    if epilogue.requantize is None:
        return value + data.residual if epilogue.float_residual else value
    q = round_and_clamp(value, epilogue.requantize)
    add = epilogue.residual_add
    if add is not None:
        b = data.residual.astype(np.int32)
        v = (q.astype(np.int32) - add.a_zero_point) * add.a_multiplier
        v = v + (b - add.b_zero_point) * add.b_multiplier
        q = round_and_clamp(v.astype(np.float32) * np.float32(2.0**-add.shift), add)
    return q


def run_kernel(
    workload: Conv2d,
    row: Isa,
    data: Data,
    out: np.ndarray,
    threads: int = 1,
    choice: ConvChoice | None = None,
) -> np.ndarray:
    """The kernel's physical output; ``out`` gives its shape."""
    packed = pack_conv2d(workload, row, data.weight, data.bias, data.multiplier, choice)
    arrays = [pack(workload.x, data.x), *packed]
    if workload.residual is not None:
        arrays.append(pack(workload.residual, data.residual))
    return run(conv2d(workload, row, threads, choice), row, *arrays, out=out)


def check_exact(
    workload: Conv2d,
    row: Isa,
    threads: int = 1,
    batch: int = 1,
    data: Data | None = None,
    choice: ConvChoice | None = None,
) -> None:
    """Integer kernels equal the definition bit for bit, margins and pad channels included."""
    data = data or random_data(workload, batch=batch)
    expected = pack(workload.y, reference(workload, data).astype(workload.y.dtype))
    actual = run_kernel(workload, row, data, expected, threads, choice)
    np.testing.assert_array_equal(actual, expected)


def check_close(workload: Conv2d, row: Isa, threads: int = 1, batch: int = 1) -> None:
    """Float kernels against float64: the rounding of a sum of ``depth`` products of unit variance, and no more."""
    data = random_data(workload, batch=batch)
    expected = pack(workload.y, reference(workload, data).astype(np.float32))
    actual = run_kernel(workload, row, data, expected, threads)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
