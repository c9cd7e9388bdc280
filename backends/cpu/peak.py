"""The machine's peak for an ISA row: its dot product in a loop that touches registers only.

Every kernel's speed is reported as a share of this number, measured on the same machine in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tvm
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.isa import Isa

_ITERATIONS = 20_000  # 40 us a call with AVX-512: short enough to finish between two interruptions
CHAINS = 14  # independent accumulators: covers two 6-cycle operations a cycle and fits 16 registers
_CALLS = 300


def peak_name(dtype: str) -> str:
    """The kernel's function name: ``peak_u8s8`` or ``peak_f32``."""
    return "peak_u8s8" if dtype == "uint8" else "peak_f32"


def peak_operations(isa: Isa, dtype: str) -> int:
    """Operations (a multiply-accumulate is two) in one call of the kernel."""
    products = isa.dense(dtype)[-1].dot_group if dtype == "uint8" else 1
    return 2 * _ITERATIONS * CHAINS * isa.lanes * products


def peak_kernel(isa: Isa, dtype: str) -> tvm.tirx.PrimFunc:
    """A PrimFunc ``(x, y)`` on vectors of ``lanes`` 32-bit elements: ``dtype`` "uint8" (int32 vectors) or "float32".

    A row whose dot product does not accumulate feeds each accumulator back as an operand: an invariant product would
    leave the loop.
    """
    element = "int32" if dtype == "uint8" else "float32"
    isa = isa.dense(dtype)[-1]
    lanes = isa.lanes
    with emit.kernel(peak_name(dtype)) as builder:
        x = T.arg("x", T.buffer((lanes,), element))
        y = T.arg("y", T.buffer((CHAINS * lanes,), element))
        operand = emit.bind(emit.load(x, 0, lanes))
        accumulators = emit.Accumulators(CHAINS, 1, element, lanes)
        for i in range(CHAINS):
            start = operand + emit.constant(element, i, lanes)
            accumulators.set(i, 0, start)
        with emit.loop(_ITERATIONS):
            for i in range(CHAINS):
                accumulators.set(i, 0, _chain(isa, dtype, accumulators.get(i, 0), operand))
        for i in range(CHAINS):
            emit.store(y, i * lanes, accumulators.get(i, 0))
    return builder.get()


def _chain(isa: Isa, dtype: str, accumulator: emit.Expr, operand: emit.Expr) -> emit.Expr:
    """One dot product that depends on its accumulator."""
    if dtype != "uint8":
        return emit.multiply_add(isa, accumulator, operand, operand)
    vector = emit.vector("int32", isa.lanes)
    if isa.form == "long":  # an invariant product would leave the loop here, too
        narrow = f"int8x{4 * isa.lanes}"
        both = T.reinterpret(narrow, accumulator)
        return emit.dot(isa, accumulator, [both], [T.reinterpret(narrow, operand)])
    narrow = f"int16x{2 * isa.lanes}" if isa.form == "pairs" else f"int8x{4 * isa.lanes}"
    right = T.reinterpret(narrow, operand)
    if isa.dot_accumulates:
        return emit.intrinsic(vector, isa.dot_intrinsic, accumulator, right, right)
    left = T.reinterpret(narrow, accumulator)
    return accumulator + emit.intrinsic(vector, isa.dot_intrinsic, left, right)


def time_peak(function: Callable[..., object], isa: Isa, dtype: str) -> float:
    """GOPS of a compiled ``peak_kernel``: the best of many calls, since anything else on the core only slows it."""
    element = np.int32 if dtype == "uint8" else np.float32
    x = tvm.runtime.tensor(np.zeros(isa.lanes, element))
    y = tvm.runtime.tensor(np.zeros(CHAINS * isa.lanes, element))
    best = float("inf")
    for _ in range(_CALLS):
        start = time.perf_counter()
        function(x, y)
        best = min(best, time.perf_counter() - start)
    return peak_operations(isa, dtype) / best / 1e9


def measure_peak(isa: Isa, dtype: str) -> float:
    """GOPS of one core on register-only dot products of a row; this CPU must have the row's features."""
    module = tvm.compile(peak_kernel(isa, dtype), target=isa.target())
    return time_peak(module[peak_name(dtype)], isa, dtype)
