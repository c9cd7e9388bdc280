"""Time every kernel of a model where it runs: in its place, with the data and caches of a real call.

The virtual machine asks an instrument before each call; the instrument makes the call itself between
two readings of the clock and has the machine skip it. A time includes 0.3 us for the call.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import BenchmarkError
from graphopt.manifest import Dim, Kernel, Manifest
from graphopt.session import Session

_RUN, _SKIP = 0, 1
_MACHINERY = ("vm.", "shape_func")


@dataclass(frozen=True)
class KernelTime:
    """One call site: its place in the order of execution, what it computes, and seconds a call.

    ``seconds`` is the median of the runs, ``fastest`` their minimum.
    """

    index: int
    kernel: Kernel
    seconds: float
    fastest: float
    macs: int | None

    @property
    def gops(self) -> float | None:
        """``2 * macs / seconds / 1e9``: a multiply-accumulate is two operations."""
        return None if self.macs is None else 2e-9 * self.macs / self.seconds


class _Clock:
    """The instrument: name and nanoseconds of each kernel call of one run."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, function: Any, name: str, before: bool, _: Any, *arguments: Any) -> int:
        if not before or name.startswith(_MACHINERY):
            return _RUN
        start = time.perf_counter_ns()
        function(*arguments)
        self.calls.append((str(name), time.perf_counter_ns() - start))
        return _SKIP


def _call_sites(names: Iterable[str], kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return the manifest's entry for each call: the k-th call of a name is its k-th entry."""
    entries: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        entries[kernel.name].append(kernel)
    seen: Counter[str] = Counter()
    sites = []
    for name in names:
        known = entries[name] or [Kernel(name)]
        sites.append(known[min(seen[name], len(known) - 1)])
        seen[name] += 1
    return sites


def _batch(manifest: Manifest, inputs: Sequence[Any]) -> int:
    """Return by what the MACs of a kernel are multiplied: the images that are run one by one, or the dynamic dimension."""
    if manifest.image_by_image:
        return len(inputs[0])
    for spec, value in zip(manifest.inputs, inputs, strict=True):
        for declared, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(declared, Dim):
                return int(size)
    return 1


def time_kernels(session: Session, inputs: Sequence[Any], runs: int = 20) -> list[KernelTime]:
    """Return every kernel call in order with its times over ``runs`` runs, summed over images that are run one by one.

    Raises ``BenchmarkError`` if two runs call different kernels.
    """
    samples: list[list[int]] = []
    names: list[str] = []
    session(*inputs)
    for _ in range(runs):
        clock = _Clock()
        session.run_instrumented(clock, *inputs)
        called = [name for name, _ in clock.calls]
        if names and called != names:
            raise BenchmarkError(
                "the model calls other kernels from run to run; time it as a whole"
            )
        names = called
        samples.append([nanoseconds for _, nanoseconds in clock.calls])
    batch = _batch(session.manifest, inputs)
    images = batch if session.manifest.image_by_image else 1
    names = names[: len(names) // images]
    table = np.array(samples, np.int64).reshape(runs, images, len(names)).sum(axis=1) / 1e9
    sites = _call_sites(names, session.manifest.kernels)
    return [
        KernelTime(
            index,
            kernel,
            float(np.median(table[:, index])),
            float(table[:, index].min()),
            None if kernel.macs is None else kernel.macs * batch,
        )
        for index, kernel in enumerate(sites)
    ]
