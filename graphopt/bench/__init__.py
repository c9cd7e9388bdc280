"""Measure a compiled model: latency, a row a kernel, and rivals on the same model and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.bench.kernels import KernelTime, time_kernels
from graphopt.bench.peak import measure_peaks
from graphopt.bench.report import Comparison, Report, machine_name
from graphopt.bench.timing import Timing, time_call, time_interleaved
from graphopt.errors import BenchmarkError
from graphopt.session import Session

__all__ = [
    "Comparison",
    "KernelTime",
    "Report",
    "Timing",
    "benchmark",
    "measure_peaks",
    "time_call",
    "time_interleaved",
    "time_kernels",
]

_KERNEL_RUNS = 20


def as_inputs(inputs: Any) -> tuple[Any, ...]:
    """Return one array, or a sequence of them, as the tuple of a call's arguments."""
    values = (inputs,) if hasattr(inputs, "__dlpack__") else tuple(inputs)
    if not values:
        raise BenchmarkError("no inputs were given; pass one array for each input of the model")
    return tuple(v if isinstance(v, np.ndarray) else np.from_dlpack(v) for v in values)


def benchmark(
    session: Session,
    inputs: Any | Sequence[Any],
    runs: int | None = None,
    seconds: float = 2.0,
    peaks: Mapping[str, float] | None = None,
) -> Report:
    """Time ``session`` on ``inputs`` (an array or a sequence of them), whole and kernel by kernel.

    ``runs`` calls, or as many as ``seconds`` allow. ``peaks`` (GOPS by dtype) replaces the peak measured
    with the file's own peak kernels. Raises ``BenchmarkError`` without inputs or runs, ``InputError`` for
    inputs that the model does not take.
    """
    arrays = as_inputs(inputs)
    latency = time_call(lambda: session(*arrays), runs, seconds)
    return Report(
        latency=latency,
        kernels=tuple(time_kernels(session, arrays, min(_KERNEL_RUNS, latency.runs))),
        peaks=measure_peaks(session) if peaks is None else peaks,
        target=session.manifest.target,
        threads=session.threads,
        machine=machine_name(),
        inputs={
            name: f"{array.dtype} {list(array.shape)}"
            for name, array in zip(session.input_names, arrays, strict=True)
        },
    )
