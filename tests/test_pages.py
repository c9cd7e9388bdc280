"""Tensors placed in one block: disjoint, aligned, writable, of the shapes asked for."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from graphopt.pages import Spec, empty_together
from graphopt.weights_file import is_aligned


@pytest.mark.parametrize("large", [0, 3 * 2**20], ids=["small pages", "large pages"])
def test_arrays_are_aligned_and_disjoint(large: int) -> None:
    specs: list[Spec] = [
        ((3, 5), np.dtype(np.float32)),
        ((0, 4), np.dtype(np.int8)),
        ((), np.dtype(np.int64)),
        ((large + 7,), np.dtype(np.uint8)),
        ((2, 2, 2), np.dtype(np.float64)),
    ]
    arrays = empty_together(specs)
    for number, array in enumerate(arrays):
        array[...] = number
    assert [(a.shape, a.dtype) for a in arrays] == specs
    assert all(is_aligned(array) for array in arrays)
    for number, array in enumerate(arrays):
        assert (array == number).all()


def test_the_memory_lives_as_long_as_one_array() -> None:
    first, last = empty_together([((4,), np.dtype(np.int32)), ((2**20,), np.dtype(np.int32))])
    first[...] = 7
    last[...] = 1
    del last
    gc.collect()
    assert first.tolist() == [7, 7, 7, 7]


def test_nothing_is_asked_for() -> None:
    assert empty_together([]) == []
