"""Run one kernel on one row and compare physical tensors, margins and pad channels included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm

from graphopt.backends.cpu.workload import Layout
from graphopt.backends.x86.isa import ISAS
from tests.backends.arm import machine

HERE = {row.mtriple for row in ISAS.values()}


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":")[1].split())
    return frozenset()


ROWS = [row for row in ISAS.values() if not row.missing(_cpu_flags())]


def random_map(layout: Layout, seed: int, batch: int = 1) -> np.ndarray:
    """A logical ``[N, C, H, W]`` tensor; bytes over their whole range, floats with ties and large values."""
    generator = np.random.default_rng(seed)
    shape = (layout.batch or batch, layout.channels, layout.height, layout.width)
    if layout.dtype == "uint8":
        return generator.integers(0, 256, shape).astype(np.uint8)
    if layout.dtype == "int8":
        return generator.integers(-128, 128, shape).astype(np.int8)
    return (generator.integers(-4000, 4000, shape) / 32).astype(np.float32)


def pack(layout: Layout, logical: np.ndarray, order: str = "nhwc") -> np.ndarray:
    """The physical tensor that holds ``logical``."""
    if order == "nchw":
        return np.ascontiguousarray(logical)
    shape = (logical.shape[0], layout.rows, layout.columns, layout.channel_stride)
    physical = np.full(shape, layout.fill, dtype=layout.dtype)
    rows = slice(layout.top, layout.top + layout.height)
    columns = slice(layout.left, layout.left + layout.width)
    physical[:, rows, columns, : layout.channels] = logical.transpose(0, 2, 3, 1)
    return physical


def run(function: tvm.tirx.PrimFunc, row, *arrays: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Call the kernel with an output of noise, so that an element it does not write shows; ARM rows on an emulator."""
    noise = np.random.default_rng(99).integers(0, 256, out.nbytes).astype(np.uint8)
    noise = noise.view(out.dtype).reshape(out.shape)
    if row.mtriple not in HERE:
        return machine.run(function, row, *arrays, out=noise)
    result = tvm.runtime.tensor(noise)
    module = tvm.compile(function, target=row.target())
    name = function.attrs["global_symbol"]
    module[name](*[tvm.runtime.tensor(array) for array in arrays], result)
    return np.asarray(result.numpy())


def round_and_clamp(value: np.ndarray, parameters) -> np.ndarray:
    """The definition, in float32: ``zero_point + rint(clamp(value, ...))``; NaN goes to qmin."""
    assert value.dtype == np.float32
    low = np.float32(parameters.qmin - parameters.zero_point)
    high = np.float32(parameters.qmax - parameters.zero_point)
    value = np.where(value > low, value, low)
    value = np.where(value < high, value, high)
    return np.asarray(np.rint(value).astype(np.int32) + parameters.zero_point)
