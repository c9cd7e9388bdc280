"""gelu of whole vectors, looked up where the row can, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.cpu.piecewise import can_look_up
from graphopt.backends.cpu.workload import Activation, Epilogue
from graphopt.backends.x86.isa import ISAS
from tests.backends.cpu.conv_harness import Data, conv_workload, run_kernel
from tests.backends.cpu.stream_harness import ROWS

CHANNELS, PIXELS = 32, 250


def gelu_of(x: np.ndarray, row) -> np.ndarray:
    """What a layer of identity weights makes of ``[CHANNELS, PIXELS]``."""
    workload = conv_workload(
        (CHANNELS, CHANNELS),
        (1, PIXELS),
        (1, 1),
        padding=(0, 0),
        dtype="float32",
        epilogue=Epilogue(activation=Activation("gelu")),
    )
    identity = np.eye(CHANNELS, dtype=np.float32).reshape(CHANNELS, CHANNELS, 1, 1)
    zeros = np.zeros(CHANNELS, np.float32)
    data = Data(x.reshape(1, CHANNELS, 1, PIXELS), identity, zeros, zeros, zeros)
    out = np.zeros((1, 1, PIXELS, CHANNELS), np.float32)
    return run_kernel(workload, row, data, out).reshape(PIXELS, CHANNELS).T


def test_rows_that_look_up() -> None:
    assert {row.name for row in ISAS.values() if can_look_up(row, row.lanes)} == {"avx512-vnni", "avx512"}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("end", [0.2, 5.9, 80.0])
def test_near_the_definition(end: float, row) -> None:
    """1e-6: the polynomials' 4e-7 and the rounding of the difference; ``relu`` beyond +-5.6."""
    x = np.linspace(-end, end, CHANNELS * PIXELS, dtype=np.float32).reshape(CHANNELS, PIXELS)
    expected = F.gelu(torch.from_numpy(x.astype(np.float64))).numpy()
    actual = gelu_of(x, row)
    np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=1e-6)
    beyond = np.abs(x) > 5.61
    np.testing.assert_array_equal(actual[beyond], np.maximum(x, 0)[beyond])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_zero_is_exact(row) -> None:
    x = np.zeros((CHANNELS, PIXELS), np.float32)
    x[:, 1] = np.geomspace(1e-38, 1e-3, CHANNELS)
    actual = gelu_of(x, row)
    assert not actual[:, 0].any()
    expected = F.gelu(torch.from_numpy(x[:, 1].astype(np.float64))).numpy()
    np.testing.assert_allclose(actual[:, 1], expected, rtol=2e-6)
