"""Time calls: medians and quartiles of many, bursts of rivals interleaved.

Medians, since what disturbs a measurement only ever makes it longer; interleaved, since a clock or a
noisy neighbour changes over seconds and would otherwise favour whoever ran at the right moment.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from graphopt.errors import BenchmarkError

_BURST_NS = (
    20_000_000  # a rival runs 20 ms before the next one does: caches are warm for most calls
)
_LEAST_RUNS = (
    5  # of a rival, and of a burst: slow models take more than one run to fill the caches again
)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the quartiles around it, the fastest, and how many were timed."""

    median: float
    lower: float
    upper: float
    fastest: float
    runs: int

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Timing:
        """Summarise samples; raises ``BenchmarkError`` if there are none."""
        if not nanoseconds:
            raise BenchmarkError("nothing was timed; allow one run or more")
        lower, median, upper = np.percentile(nanoseconds, (25, 50, 75)) / 1e9
        fastest = min(nanoseconds) / 1e9
        return cls(float(median), float(lower), float(upper), fastest, len(nanoseconds))

    @property
    def spread(self) -> float:
        """The distance between the quartiles as a share of the median."""
        return (self.upper - self.lower) / self.median if self.median else 0.0


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _timed(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def _check_budget(runs: int | None, seconds: float) -> None:
    if runs is not None and runs < 1:
        raise BenchmarkError(f"runs is {runs}; it must be 1 or more")
    if seconds <= 0:
        raise BenchmarkError(f"seconds is {seconds}; it must be more than 0")


def time_call(call: Callable[[], object], runs: int | None = None, seconds: float = 2.0) -> Timing:
    """Time ``runs`` calls, or as many as ``seconds`` allow (5 at least), after a warm-up.

    Raises ``BenchmarkError`` for a budget without a run.
    """
    _check_budget(runs, seconds)
    samples: list[int] = []
    with _no_garbage_collection():
        call()
        _timed(call)
        stop = time.perf_counter() + seconds
        while len(samples) < (runs or _LEAST_RUNS) or (runs is None and time.perf_counter() < stop):
            samples.append(_timed(call))
    return Timing.of(samples)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 2.0,
    progress: Callable[[float], None] = lambda _share: None,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time rivals in turns: each gets bursts of 20 ms and 5 runs at least, until each has had ``seconds``.

    The first call of a burst, which finds the caches full of the rival's data, is not counted. ``pause`` seconds stand
    before each burst, for thread pools that spin on after their work. ``progress`` is told the share that is done.
    Raises ``BenchmarkError`` for a budget without a run.
    """
    _check_budget(None, seconds)
    samples: dict[str, list[int]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0)
    budget = int(seconds * 1e9)
    with _no_garbage_collection():
        for call in calls.values():
            call()
        while any(spent[name] < budget or len(samples[name]) < _LEAST_RUNS for name in calls):
            for name, call in calls.items():
                time.sleep(pause)
                spent[name] += _burst(call, samples[name])
            progress(min(1.0, min(spent.values()) / budget))
    return {name: Timing.of(times) for name, times in samples.items()}


def _burst(call: Callable[[], object], samples: list[int]) -> int:
    total = _timed(call)
    counted: list[int] = []
    while total < _BURST_NS or len(counted) < _LEAST_RUNS:
        counted.append(_timed(call))
        total += counted[-1]
    samples.extend(counted)
    return total
