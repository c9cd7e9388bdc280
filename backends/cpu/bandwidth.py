"""The machine's read bandwidth for an ISA row: one core adds up a buffer that fits one level of its memory or not.

With the peak it makes the roof over every kernel: ``min(peak, bandwidth * operations a byte)``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import tvm
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.isa import Isa

# Sizes well inside L2 (1 MiB and more since Zen 4 and Ice Lake) and L3, and past any L3 share of one core.
WORKING_SETS: Mapping[str, int] = MappingProxyType(
    {"L2": 384 * 2**10, "L3": 8 * 2**20, "memory": 256 * 2**20}
)
_CHAINS = 8  # independent sums: an addition takes less time than the loads of one
_BYTES_A_CALL = 64 * 2**20
_CALLS = 15


def _passes(size: int) -> int:
    return max(1, _BYTES_A_CALL // size)


def bandwidth_kernel(isa: Isa, size: int) -> tvm.tirx.PrimFunc:
    """A PrimFunc ``(x, y)`` that adds the int32 vectors of ``size`` bytes, again and again, into ``_CHAINS`` vectors."""
    step = _CHAINS * isa.lanes
    with emit.kernel(f"bandwidth_{size}") as builder:
        x = T.arg("x", T.buffer((size // 4,), "int32"))
        y = T.arg("y", T.buffer((step,), "int32"))
        sums = emit.Accumulators(_CHAINS, 1, "int32", isa.lanes)
        for i in range(_CHAINS):
            sums.set(i, 0, emit.constant("int32", 0, isa.lanes))
        with emit.loop(_passes(size)), emit.loop(size // 4 // step) as block:
            for i in range(_CHAINS):
                start = block * step + i * isa.lanes
                sums.set(i, 0, sums.get(i, 0) + emit.load(x, start, isa.lanes))
        for i in range(_CHAINS):
            emit.store(y, i * isa.lanes, sums.get(i, 0))
    return builder.get()


def measure_bandwidths(isa: Isa) -> dict[str, float]:
    """GB/s that one core reads by the memory that holds the data: the best of many calls."""
    rates = {}
    for memory, size in WORKING_SETS.items():
        module = tvm.compile(bandwidth_kernel(isa, size), target=isa.target())
        function = module[f"bandwidth_{size}"]
        x = tvm.runtime.tensor(np.ones(size // 4, np.int32))
        y = tvm.runtime.tensor(np.zeros(_CHAINS * isa.lanes, np.int32))
        best = float("inf")
        for _ in range(_CALLS):
            start = time.perf_counter()
            function(x, y)
            best = min(best, time.perf_counter() - start)
        rates[memory] = 1e-9 * size * _passes(size) / best
    return rates
