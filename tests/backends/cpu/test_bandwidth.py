"""bandwidth_kernel reads every element, once a pass."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from graphopt.backends.cpu import bandwidth
from graphopt.backends.cpu.bandwidth import bandwidth_kernel, measure_bandwidths
from tests.backends.cpu.stream_harness import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_element_is_added_once_a_pass(row, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 16 * 1024
    monkeypatch.setattr(bandwidth, "_BYTES_A_CALL", 3 * size)
    module = tvm.compile(bandwidth_kernel(row, size), target=row.target())
    x = np.random.default_rng(0).integers(-1000, 1000, size // 4).astype(np.int32)
    y = tvm.runtime.tensor(np.zeros(8 * row.lanes, np.int32))
    module[f"bandwidth_{size}"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), 3 * x.reshape(-1, 8 * row.lanes).sum(axis=0))


def test_every_memory_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "WORKING_SETS", {"L2": 2**16, "L3": 2**18})
    rates = measure_bandwidths(ROWS[0])
    assert list(rates) == ["L2", "L3"]
    assert min(rates.values()) > 0
