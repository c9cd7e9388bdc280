"""Sums in integers, an activation in float, bytes: one kernel has the bits of the two that it replaces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue, Requantize
from tests.backends.cpu.conv_harness import conv_workload, random_data, run_kernel
from tests.backends.cpu.stream_harness import ROWS, pack, round_and_clamp

TO_BYTES = Requantize(zero_point=17, qmin=3, qmax=250)
SCALE = float(np.float32(1 / 0.037))
SHAPES = {
    "linear over 37 tokens": {"channels": (64, 50), "size": (1, 37), "kernel": (1, 1), "padding": (0, 0)},
    "one step, one pixel": {"channels": (4, 96), "size": (1, 1), "kernel": (1, 1), "padding": (0, 0)},
    "few steps, margins": {"channels": (3, 32), "size": (19, 18), "stride": (2, 2), "y_margin": 1},
    "two channel blocks": {"channels": (20, 150), "size": (9, 16), "kernel": (1, 1), "padding": (0, 0)},
}  # fmt: skip


def quantizing(shape: str, name: str | None) -> Conv2d:
    activation = None if name is None else Activation(name)
    epilogue = Epilogue(TO_BYTES, activation=activation, inverse_scale=SCALE)
    return conv_workload(epilogue=epilogue, **SHAPES[shape])  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gelu", "hard_swish"])
def test_bytes_of_the_float_kernel(shape: str, name: str, row) -> None:
    workload = quantizing(shape, name)
    data = random_data(workload)
    data = replace(data, multiplier=data.multiplier / np.float32(25))  # from -5 to 5 or so
    layout = replace(workload.y, dtype="float32", fill=0)
    epilogue = replace(workload.epilogue, requantize=None, inverse_scale=0.0)
    floats = run_kernel(
        replace(workload, y=layout, epilogue=epilogue),
        row,
        data,
        pack(layout, np.zeros((1, layout.channels, layout.height, layout.width), np.float32)),
    )
    logical = floats[
        :,
        layout.top : layout.top + layout.height,
        layout.left : layout.left + layout.width,
        : layout.channels,
    ].transpose(0, 3, 1, 2)
    scaled = logical * np.float32(SCALE)
    assert np.unique(scaled).size > 20
    assert (scaled < 0).any()
    expected = pack(workload.y, round_and_clamp(scaled, TO_BYTES).astype(np.uint8))
    np.testing.assert_array_equal(run_kernel(workload, row, data, expected), expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_without_an_activation(row) -> None:
    """``rint(float32(float32(sum * multiplier) * scale))``: two roundings, and not those of one product."""
    workload = quantizing("linear over 37 tokens", None)
    data = random_data(workload)
    sums = data.x.astype(np.int64).reshape(64, 37) - workload.x_zero_point
    sums = data.weight.astype(np.int64).reshape(50, 64) @ sums + data.bias[:, None]
    value = sums.astype(np.float32) * data.multiplier[:, None]
    q = round_and_clamp(value * np.float32(SCALE), TO_BYTES).astype(np.uint8)
    expected = pack(workload.y, q.reshape(1, 50, 1, 37))
    np.testing.assert_array_equal(run_kernel(workload, row, data, expected), expected)
