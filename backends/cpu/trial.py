"""One trial: a candidate against the cost model's own choice, in turns, on this machine or over TVM's RPC.

Both are timed by TVM's evaluator on the device, every call with weights and outputs flushed from the caches: nearer to
what most layers of ResNet-50 take inside the network than warm caches, which say up to 15 % less; the cost of a residual
is overstated (by 8 % at 56 x 56 x 64 -> 256).
"""

from __future__ import annotations

import contextlib
import functools
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from graphopt.backends.cpu.conv import conv2d
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.isas import ISAS
from graphopt.runtime import use_threads
from graphopt.tuning.protocol import Unmeasurable

ROUND_SECONDS = 5e-3  # of each rival: short beside changes of the clock frequency
FEWEST_ROUNDS = 5
_FLUSH = "cache_flush_cpu_non_first_arg"
_CONNECT_SECONDS = 5.0
_SESSION_SECONDS = 60  # after which the server ends a candidate that hangs
_BIG_CORES = 1  # TVM's ThreadGroup::AffinityMode


@dataclass(frozen=True)
class Remote:
    """A device behind an RPC tracker, by the key that its server registered."""

    host: str
    port: int
    key: str


@dataclass(frozen=True)
class Job:
    """What to measure, for about how many seconds."""

    workload: Conv2d
    isa: str
    threads: int
    choice: ConvChoice
    seconds: float
    remote: Remote | None = None


@dataclass(frozen=True)
class Result:
    """Seconds of the candidate and of the cost model's choice, medians of turns; ``ratio`` is the median of the turns'."""

    seconds: float
    reference: float
    ratio: float

    @staticmethod
    def of_turns(turns: Sequence[tuple[float, float]]) -> Result:
        """Of the seconds of the candidate and of the reference in each turn."""
        ratio = statistics.median(mine / its for mine, its in turns)
        seconds, its = (statistics.median(column) for column in zip(*turns, strict=True))
        return Result(seconds, its, ratio)


@dataclass(frozen=True)
class CompiledKernel:
    name: str
    library: Any  # what tvm.compile made
    constants: tuple[np.ndarray[Any, Any], ...]


def made_up(workload: Conv2d) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """A weight and, for uint8 activations, a multiplier of the workload's sizes."""
    integer = workload.x.dtype == "uint8"
    shape = (workload.y.channels, workload.x.channels // workload.groups, *workload.kernel)
    weight = np.random.default_rng(0).integers(-64, 64, shape)
    multiplier = np.full(workload.y.channels, 1e-4, np.float32) if integer else None
    return weight.astype(np.int8 if integer else np.float32), multiplier


@functools.lru_cache(maxsize=2)
def _compiled(
    workload: Conv2d, isa: Isa, threads: int, choice: ConvChoice | None
) -> CompiledKernel:
    function = conv2d(workload, isa, threads, choice)
    weight, multiplier = made_up(workload)
    library = tvm.compile(function, target=isa.target())
    name = str(function.attrs["global_symbol"])
    packed = pack_conv2d(workload, isa, weight, None, multiplier, choice)
    return CompiledKernel(name, library, tuple(packed))


def _activations(layout: Layout) -> np.ndarray[Any, Any]:
    shape = (layout.batch or 1, *layout.shape)
    return np.random.default_rng(1).integers(0, 128, shape).astype(layout.dtype)


class _Here:
    """This machine: the compiled code is called where it is."""

    def __init__(self, threads: int) -> None:
        use_threads(threads)
        self.device = tvm.cpu(0)

    def load(self, kernel: CompiledKernel) -> Any:
        return kernel.library.mod


class _There:
    """A device of a tracker: code is linked here and sent."""

    def __init__(self, remote: Remote, threads: int, folder: Path) -> None:
        from tvm import rpc

        self.folder = folder
        _check_tracker(remote)
        tracker = rpc.connect_tracker(remote.host, remote.port)
        if remote.key not in tracker.summary()["queue_info"]:  # a request would wait for ever
            raise Unmeasurable(f"no device of key {remote.key!r} is registered at the tracker")
        self.session = tracker.request(remote.key, session_timeout=_SESSION_SECONDS)
        configure = self.session.get_function("runtime.config_threadpool")
        configure(_BIG_CORES, threads)
        self.device = self.session.cpu(0)

    def load(self, kernel: CompiledKernel) -> Any:
        path = self.folder / f"{kernel.name}.so"
        kernel.library.export_library(str(path))
        self.session.upload(str(path))
        return self.session.load_module(path.name)


def _check_tracker(remote: Remote) -> None:
    """Where nothing listens, TVM's client tries again for minutes."""
    try:
        socket.create_connection((remote.host, remote.port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        place = f"{remote.host}:{remote.port}"
        raise Unmeasurable(f"no RPC tracker answers at {place} ({error.strerror})") from error


@contextlib.contextmanager
def open_device(remote: Remote | None, threads: int) -> Iterator[_Here | _There]:
    """This machine, or one of a tracker."""
    if remote is None:
        yield _Here(threads)
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        yield _There(remote, threads, Path(folder))


def timer(
    device: _Here | _There, kernel: CompiledKernel, layouts: Sequence[Layout]
) -> Callable[[int], float]:
    """``seconds(n)``: the median of ``n`` calls on cold caches. ``layouts`` are those of the inputs and the output."""
    x, *others = map(_activations, layouts)
    arrays = [x, *kernel.constants, *others]
    arguments = [tvm.runtime.tensor(array, device.device) for array in arrays]
    module = device.load(kernel)

    def seconds(calls: int) -> float:
        evaluate = module.time_evaluator(
            kernel.name, device.device, number=1, repeat=calls, f_preproc=_FLUSH
        )
        return float(statistics.median(evaluate(*arguments).results))

    return seconds


def layouts_of(workload: Conv2d) -> list[Layout]:
    """Of the inputs and the output."""
    residual = [] if workload.residual is None else [workload.residual]
    return [workload.x, *residual, workload.y]


def run(job: Job) -> Result:
    """Compile both, then time them in turns. Raises ``Unmeasurable`` where it is not the candidate that fails."""
    isa, layouts = ISAS[job.isa], layouts_of(job.workload)
    with contextlib.ExitStack() as stack:
        try:
            device = stack.enter_context(open_device(job.remote, job.threads))
            kernel = _compiled(job.workload, isa, job.threads, None)
            reference = timer(device, kernel, layouts)
            calls = max(3, int(ROUND_SECONDS / max(reference(1), 1e-6)))
        except Exception as error:
            raise Unmeasurable(str(error)) from error
        kernel = _compiled(job.workload, isa, job.threads, job.choice)
        candidate = timer(device, kernel, layouts)
        turns: list[tuple[float, float]] = []
        stop = time.perf_counter() + job.seconds
        while len(turns) < FEWEST_ROUNDS or time.perf_counter() < stop:
            turns.append((candidate(calls), reference(calls)))
    return Result.of_turns(turns)
