"""measure_peak: its operations are really executed, and the rows come out in the order of their vector widths."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from graphopt.backends.cpu.peak import measure_peak, peak_kernel, peak_name, peak_operations
from graphopt.backends.x86.isa import ISAS
from tests.backends.cpu.stream_harness import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_positive(row, dtype: str) -> None:
    assert measure_peak(row, dtype) > 1


def test_a_dot_product_is_executed_for_each_counted_operation() -> None:
    """Operand bytes of 1 add 4 to every lane in each of the 20,000 iterations."""
    row = ISAS["avx512-vnni"]
    if row not in ROWS:
        pytest.skip("this CPU lacks AVX-512 VNNI")
    module = tvm.compile(peak_kernel(row, "uint8"), target=row.target())
    ones = np.full(row.lanes, 0x01010101, np.int32)
    y = tvm.runtime.tensor(np.zeros(14 * row.lanes, np.int32))
    module[peak_name("uint8")](tvm.runtime.tensor(ones), y)
    start = ones[None, :] + np.arange(14, dtype=np.int32)[:, None]
    np.testing.assert_array_equal(y.numpy().reshape(14, -1), start + 4 * 20_000)
    assert peak_operations(row, "uint8") == 2 * 20_000 * 14 * 16 * 4
