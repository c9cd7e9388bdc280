"""Tensors in one block of memory, on pages of 2 MiB where the system has them.

A run reads every weight once. On pages of 4 KiB the hardware's prefetch stops at the end of each and the page table is
looked up anew: ResNet-50 in int8 (50 MB with Winograd's weights) takes 3 % longer.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from graphopt.weights_file import ALIGNMENT, aligned_empty

_PAGE = 2 * 2**20

Array = np.ndarray[Any, Any]
Spec = tuple[tuple[int, ...], np.dtype[Any]]


def empty_together(specs: Sequence[Spec]) -> list[Array]:
    """Uninitialised C-contiguous arrays of these shapes and dtypes, each at a multiple of 64 bytes.

    Large pages are a hint to the system, and asked for only where one would be filled.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    block = _large_pages(end) if end >= _PAGE else aligned_empty((end,), np.dtype(np.uint8))
    return [
        np.ndarray(shape, dtype, block.data, place)
        for (shape, dtype), place in zip(specs, places, strict=True)
    ]


def _large_pages(size: int) -> Array:
    """Bytes that begin at the start of a large page."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(memory, np.uint8)
    start = -block.ctypes.data % _PAGE
    return block[start : start + size]
