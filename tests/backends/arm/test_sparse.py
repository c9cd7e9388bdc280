"""Sparse kernels of rows that multiply ``x - flip``: pixels are flipped when they are copied, whatever the cut of a tile."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import arm
from graphopt.backends.arm.isa import DOTPROD, I8MM, ISAS, NEON
from graphopt.backends.cpu.sparse_forms import as_planar
from graphopt.backends.cpu.sparse_plan import SparseChoice, plan_sparse
from tests.backends.arm.machine import needs_qemu
from tests.backends.cpu.conv_harness import conv_workload, random_data, reference
from tests.backends.cpu.test_sparse import NO_PADDING, SHAPES, masked, run_sparse

FLIPPED = [NEON, DOTPROD]


@needs_qemu
@pytest.mark.parametrize("row", FLIPPED, ids=lambda row: row.name)
@pytest.mark.parametrize(
    "choice", [SparseChoice(1, 1), SparseChoice(1, 5), SparseChoice(1, 7, 1, 3)], ids=str
)
def test_copied_tiles_equal_the_definition(choice: SparseChoice, row) -> None:
    """Last tiles that overlap, pad channels, parts of the planes; the images of a batch."""
    workload = conv_workload((70, 9), (5, 11), batch=2, **NO_PADDING)
    data = masked(random_data(workload), 0.6)
    expected = reference(workload, data).astype(np.uint8)
    np.testing.assert_array_equal(run_sparse(workload, row, data, choice=choice), expected)


@pytest.mark.parametrize("row", FLIPPED, ids=lambda row: row.name)
def test_where_pixels_are_copied(row) -> None:
    flat, window = as_planar(SHAPES["1x1"]), as_planar(SHAPES["3x3, lines of two vectors"])
    assert plan_sparse(flat, row).copies
    assert not plan_sparse(flat, I8MM).copies  # takes bytes as they are
    assert not plan_sparse(window, row).copies  # is gathered


@pytest.mark.parametrize("name", ["neon", "raspberry-pi-5"])
def test_products_flip_nothing(name: str) -> None:
    loop = arm.examine("int8 sparse 1x1, 28x28x128 to 512", ISAS[name])
    assert loop.products
    assert "eor" not in loop.mix
