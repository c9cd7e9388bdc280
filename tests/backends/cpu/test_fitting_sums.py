"""Sums that are proved to fit int32 are clamped after rounding: by the packs, whatever the zero point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graphopt.backends.cpu.sparse_forms import rounds_in_range
from graphopt.backends.cpu.workload import Epilogue, Requantize
from tests.backends.cpu.conv_harness import check_exact, conv_workload, random_data
from tests.backends.cpu.stream_harness import ROWS

LARGEST = 255 * 128 * 36 + 5000  # of a sum of 36 products, and its bias


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("zero_point", [0, 3, 255])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 2.0**30 / LARGEST])
def test_far_outside_the_bytes(scale: float, zero_point: int, row) -> None:
    requantize = Requantize(zero_point, qmin=0, qmax=250 if zero_point < 250 else 255)
    workload = conv_workload((4, 68), epilogue=Epilogue(requantize))
    data = random_data(workload)
    data = replace(data, multiplier=np.full(68, scale, np.float32))
    fitting = rounds_in_range(workload, data.weight, data.bias, data.multiplier)
    assert fitting.epilogue.requantize == replace(requantize, fits=True)
    check_exact(fitting, row, data=data)


def test_products_that_leave_int32_do_not_fit() -> None:
    workload = conv_workload((4, 68))
    data = random_data(workload)
    scale = np.full(68, 2.0**31 / LARGEST * 2, np.float32)
    assert rounds_in_range(workload, data.weight, data.bias, scale) == workload
