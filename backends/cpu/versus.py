"""One comparison: an integer layer against its float form, in turns, each lowered as the cost model says.

The float form's time is that of its kernels one by one, borders included. Measured as a trial of tuning is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from graphopt.backends.cpu.conv import conv2d
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.cpu.convert import convert
from graphopt.backends.cpu.depthwise import depthwise, pack_depthwise
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.pointwise import add
from graphopt.backends.cpu.rivals import Call, Rivals, is_depthwise, is_winograd
from graphopt.backends.cpu.trial import (
    FEWEST_ROUNDS,
    ROUND_SECONDS,
    CompiledKernel,
    Remote,
    Result,
    layouts_of,
    made_up,
    open_device,
    timer,
)
from graphopt.backends.cpu.winograd import winograd
from graphopt.backends.cpu.winograd_plan import plan_winograd
from graphopt.backends.cpu.winograd_weights import pack_winograd
from graphopt.backends.cpu.workload import Add, Conv2d, Convert, Layout
from graphopt.backends.isas import ISAS
from graphopt.tuning.protocol import Unmeasurable

Arrays = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Job:
    """What to compare, for about how many seconds."""

    rivals: Rivals
    isa: str
    threads: int
    seconds: float
    remote: Remote | None = None


def _layer(workload: Conv2d, isa: Isa, threads: int, sums_fit: bool) -> tuple[Any, Arrays]:
    """The function that the lowering would choose, and constants of its sizes."""
    weight, multiplier = made_up(workload)
    if is_depthwise(workload):
        function = depthwise(workload, isa, threads)
        return function, pack_depthwise(workload, isa, weight, None, multiplier)
    if is_winograd(workload, isa, threads, sums_fit):
        packed = pack_winograd(workload, isa, threads, weight, None, multiplier)
        size = plan_winograd(workload, isa, threads).packed_weights
        transformed = np.ones(size, np.float32 if multiplier is None else np.int32)
        return winograd(workload, isa, threads), [transformed, *packed[1:]]
    function = conv2d(workload, isa, threads)
    return function, pack_conv2d(workload, isa, weight, None, multiplier)


def _compiled(
    call: Call, isa: Isa, threads: int, sums_fit: bool
) -> tuple[CompiledKernel, list[Layout]]:
    """A kernel, and the layouts of its tensors: inputs, then the output."""
    constants: Arrays = []
    if isinstance(call, Convert):
        function, layouts = convert(call, isa, threads), [call.x, call.y]
    elif isinstance(call, Add):
        function, layouts = add(call, isa, threads), [call.a, call.b, call.y]
    else:
        function, constants = _layer(call, isa, threads, sums_fit)
        layouts = layouts_of(call)
    library = tvm.compile(function, target=isa.target())
    name = str(function.attrs["global_symbol"])
    return CompiledKernel(name, library, tuple(constants)), layouts


def run(job: Job) -> Result:
    """Seconds of the float form, and of the integer form as the reference."""
    isa = ISAS[job.isa]
    calls = (job.rivals.int8, *job.rivals.float32)
    kernels = [_compiled(call, isa, job.threads, job.rivals.sums_fit) for call in calls]
    with contextlib.ExitStack() as stack:
        try:
            device = stack.enter_context(open_device(job.remote, job.threads))
            timers = [timer(device, kernel, layouts) for kernel, layouts in kernels]
        except Exception as error:
            raise Unmeasurable(str(error)) from error
        turns = _turns(timers, job.seconds)
    return Result.of_turns([(sum(rest), first) for first, *rest in turns])


def _turns(timers: list[Callable[[int], float]], seconds: float) -> list[list[float]]:
    counts = [max(3, int(ROUND_SECONDS / max(one(1), 1e-6))) for one in timers]
    turns: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(turns) < FEWEST_ROUNDS or time.perf_counter() < stop:
        turns.append([one(count) for one, count in zip(timers, counts, strict=True)])
    return turns
