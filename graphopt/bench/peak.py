"""The machine's own peak, in the same run as what is compared with it.

``model.so`` carries, for each dtype, a function whose only work is dot products in registers
(``manifest.peaks``); its rate is what no kernel of this target can exceed on this machine today.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from graphopt.errors import BenchmarkError
from graphopt.manifest import Dim, Peak, TensorSpec
from graphopt.runtime import tvm_runtime
from graphopt.session import Session
from graphopt.weights_file import aligned_empty

_CALLS = 20


def _zeros(spec: TensorSpec) -> Any:
    sizes = [1 if isinstance(size, Dim) else size for size in spec.shape]
    array = aligned_empty(tuple(sizes), np.dtype(spec.dtype))
    array.fill(0)
    return tvm_runtime().from_dlpack(array)


def _fastest(function: Any, peak: Peak) -> float:
    """Return the seconds of the fastest call: anything else on the core only slows it."""
    arguments = [_zeros(spec) for spec in peak.arguments]
    best = float("inf")
    for _ in range(_CALLS):
        start = time.perf_counter()
        function(*arguments)
        best = min(best, time.perf_counter() - start)
    return best


def _function(session: Session, peak: Peak) -> Any:
    try:
        return session.library.get_function(peak.function, query_imports=True)
    except AttributeError as error:
        raise BenchmarkError(
            f"the peak function {peak.function!r} is not in model.so; compile the model again"
        ) from error


def measure_peaks(session: Session) -> dict[str, float]:
    """Return GOPS by dtype on as many cores as the session uses; empty if the file carries no peak.

    Raises ``BenchmarkError`` if ``model.so`` lacks a function that the manifest lists.
    """
    rates = {}
    with ThreadPoolExecutor(session.threads) as pool:
        for peak in session.manifest.peaks:
            function = _function(session, peak)
            calls = [pool.submit(_fastest, function, peak) for _ in range(session.threads)]
            rates[peak.dtype] = sum(2e-9 * peak.macs / call.result() for call in calls)
    return rates
