"""The rows of GPUs, and the targets that lead to them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.targets import TARGETS, resolve

Array = np.ndarray[Any, Any]

GPUS = [row for row in TARGETS.values() if row.kind == "cuda"]


def test_every_row_is_a_target() -> None:
    assert sorted(row.isa for row in GPUS) == sorted(ARCHS)
    assert all(name == row.name for name, row in ARCHS.items())


def test_a_gpu_is_no_native_target() -> None:
    assert not any(row.runs_here() for row in GPUS)


@pytest.mark.parametrize(
    ("name", "row"),
    [("SM_80", "sm_80"), ("h100", "sm_90"), ("RTX_4090", "sm_89"), ("sm_87", "jetson-orin")],
)
def test_other_names(name: str, row: str) -> None:
    assert resolve(name).name == row


def test_turing_has_neither_the_larger_product_nor_copies() -> None:
    """PTX ISA: ``m16n8k32`` of bytes and ``cp.async`` from sm_80 on."""
    assert [name for name, row in ARCHS.items() if row.mma_shape == "m8n8k16"] == ["sm_75"]
    assert [name for name, row in ARCHS.items() if not row.async_copy] == ["sm_75"]


def _fragment(matrix: Array, rows: Array, columns: Array) -> Array:
    """``[lane, ...]`` elements of a matrix."""
    found: Array = matrix[rows, columns]
    return found


def test_the_four_products_of_turing_are_the_one_of_ampere() -> None:
    """PTX ISA: fragments of ``m16n8k32`` hold, register by register, those of the ``m8n8k16`` that the row's code makes."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (16, 32)), rng.integers(-128, 128, (32, 8))
    group, within = np.divmod(np.arange(32), 4)
    quad = within[:, None] * 4 + np.arange(4)
    a = [_fragment(x, (group + 8 * (i % 2))[:, None], quad + 16 * (i // 2)) for i in range(4)]
    b = [_fragment(w, quad + 16 * i, group[:, None]) for i in range(2)]
    c = np.zeros((4, 32), np.int64)
    calls = re.findall(
        r'"\+r"\(c\[(\d)\]\), "\+r"\(c\[(\d)\]\) : "r"\(a\[(\d)\]\), "r"\(b\[(\d)\]',
        ARCHS["sm_75"].products["u8"],
    )
    assert len(calls) == 4
    for first, second, i, j in (map(int, call) for call in calls):
        left, right = np.zeros((8, 16), np.int64), np.zeros((16, 8), np.int64)
        left[group[:, None], quad], right[quad, group[:, None]] = a[i], b[j]
        product = left @ right
        c[first] += product[group, within * 2]
        c[second] += product[group, within * 2 + 1]
    whole = x @ w
    for register in range(4):
        want = whole[group + 8 * (register // 2), within * 2 + register % 2]
        assert (c[register] == want).all()
