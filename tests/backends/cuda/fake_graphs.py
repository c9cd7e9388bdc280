"""CUDA graphs of a session on the fake driver: what is launched, replayed, shared, and what happens where they fail.

Run as a program of its own, like ``fake_gpu``. Prints one JSON object: a list of facts a question.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import cuda_graph, cuda_session
from graphopt.cuda_graph import CudaGraph
from graphopt.cuda_runtime import CUDART, current_stream
from graphopt.cuda_session import CudaSession
from graphopt.errors import InputError
from tests.backends.cuda.fake_gpu import Driver, check_faults

Array = np.ndarray[Any, Any]


class Network(nn.Module):
    """Two outputs, one of them in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.depthwise(self.first(x).relu())
        pooled = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(pooled), pooled


class Fixture:
    """The network for batches of 1 to 4, sessions of it, and what the driver has counted since the last question."""

    def __init__(self) -> None:
        self.driver = Driver()
        torch.manual_seed(3)
        x = torch.randn(2, 3, 6, 5)
        program = go.capture(Network().eval(), (x,), dynamic_batch=(1, 4))
        program = go.passes.Quantize(calibration=[(x,)])(program)
        self.artifact = go.compile(program, "sm_80")
        self._before = self.driver.counts()

    def session(self, **options: Any) -> CudaSession:
        session = self.artifact.session(**options)
        assert isinstance(session, CudaSession)
        return session

    def equal(self, given: Any, x: Array) -> bool:
        """True where outputs are the program's, bit for bit."""
        check_faults()
        with torch.no_grad():
            want = self.artifact.program(torch.from_numpy(x))
        return all(np.array_equal(a, b.numpy()) for a, b in zip(given, want, strict=True))

    def counted(self) -> dict[str, int]:
        after = self.driver.counts()
        found = {name: after[name] - self._before[name] for name in after}
        self._before = after
        return found


def _images(batch: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 3, 6, 5)).astype(np.float32)


def replay(fixture: Fixture) -> list[Any]:
    """Three runs, then another input: right, counted, and none in another's memory."""
    session, x, other = fixture.session(), _images(2), _images(2, 1)
    facts: list[Any] = []
    kept = []
    for value in (x, x, other):
        outputs = session(value)
        facts += [fixture.equal(outputs, value), fixture.counted()]
        kept.append((outputs, value))
    return [*facts, all(fixture.equal(*each) for each in kept)]


def batches(fixture: Fixture) -> list[Any]:
    """Every batch size three times, with two graphs a machine at most."""
    session, equal = fixture.session(), []
    for batch in (1, 2, 3, 4, 1, 2, 3, 4, 3, 4, 3, 4):
        x = _images(batch, batch)
        equal.append(fixture.equal(session(x), x))
    counted = fixture.counted()
    del session
    gc.collect()
    return [all(equal), counted["graphs"], fixture.counted()["graphs"]]


def threads(fixture: Fixture) -> list[Any]:
    """Four threads with inputs of their own."""
    session = fixture.session()

    def work(seed: int) -> bool:
        x = _images(1 + seed % 2, seed)
        return all(fixture.equal(session(x), x) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        equal = list(pool.map(work, range(8)))
    return [all(equal), fixture.counted()["replayed"] > 0]


def on_device(fixture: Fixture) -> list[Any]:
    """Tensors of the device in and out, results of all runs kept, on a stream of the caller's; no machine before the first."""
    session = fixture.session()
    lazy = "_on_device" not in vars(session)
    kept = []
    for seed in range(4):
        x = _images(2, seed)
        kept.append((session.run_on_device(session._device.tensor(x)), x))
    equal = [fixture.equal([session._device.array(t) for t in y], x) for y, x in kept]
    return [lazy, all(equal), fixture.counted()]


def in_a_graph_of_the_caller(fixture: Fixture) -> list[Any]:
    """Whoever records the session himself gets its kernels, not a graph within his."""
    session, x = fixture.session(), _images(2)
    tensor = session._device.tensor(x)
    for _ in range(2):
        session.run_on_device(tensor)
    fixture.counted()
    graph = CudaGraph(lambda: session.run_on_device(tensor))
    recorded = fixture.counted()
    graph.launch()
    return [recorded, fixture.equal([session._device.array(t) for t in graph.result], x)]


def refused(fixture: Fixture) -> list[Any]:
    """What ``run_on_device`` says of arguments that it does not take."""
    session = fixture.session()
    facts = []
    for value in (
        session._device.tensor(_images(5)),
        session._device.tensor(_images(2).astype(np.float64)),
        _images(2),
    ):
        try:
            session.run_on_device(value)
        except InputError as error:
            facts.append(str(error))
    return facts


def off(fixture: Fixture) -> list[Any]:
    """The option."""
    session, x = fixture.session(cuda_graphs=False), _images(2)
    equal = [fixture.equal(session(x), x) for _ in range(3)]
    return [all(equal), fixture.counted()["replayed"]]


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _fallen_back(fixture: Fixture) -> list[Any]:
    log = _Log()
    logger = logging.getLogger("graphopt.cuda_session")
    logger.addHandler(log)
    try:
        session, x = fixture.session(), _images(2)
        equal = [fixture.equal(session(x), x) for _ in range(3)]
        tensor = session._device.tensor(x)
        outputs = [session.run_on_device(tensor) for _ in range(3)][-1]
        equal.append(fixture.equal([session._device.array(t) for t in outputs], x))
    finally:
        logger.removeHandler(log)
    return [all(equal), fixture.counted()["replayed"], log.lines]


def _wait() -> None:
    """Break a capture off; kernels are launched after it as before."""
    ctypes.CDLL(CUDART).cudaStreamSynchronize(ctypes.c_void_p(current_stream()))


def _fail() -> None:
    raise RuntimeError("out of memory")


def broken(fixture: Fixture) -> list[Any]:
    """Captures in which something waits for the device, or raises."""
    facts = []
    original = cuda_session._Launches.launch
    for act in (_wait, _fail):

        def launch(self: Any, tensors: Any, act: Callable[[], None] = act) -> list[Any]:
            if current_stream():
                act()
            return original(self, tensors)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_session._Launches, "launch", launch)
            facts.append(_fallen_back(fixture))
    return facts


def no_memory(fixture: Fixture) -> list[Any]:
    """Enough for the tensors of one machine, not for those of a graph beside it."""
    original = cuda_session._Launches.prepare

    def prepare(self: Any, tensors: Any) -> None:
        if type(self) is cuda_session._Launches:  # a session's own are _Graphs
            _fail()
        original(self, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_session._Launches, "prepare", prepare)
        return _fallen_back(fixture)


def missing(fixture: Fixture) -> list[Any]:
    """A runtime without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "CUDART", "libnothing.so")
        cuda_graph._library.cache_clear()
        facts = _fallen_back(fixture)
    cuda_graph._library.cache_clear()
    return facts


def main() -> None:
    cuda_session.GRAPHS = 2
    fixture = Fixture()
    facts = {}
    for question in (
        replay,
        batches,
        threads,
        on_device,
        in_a_graph_of_the_caller,
        refused,
        off,
        broken,
        no_memory,
        missing,
    ):
        fixture.counted()
        facts[question.__name__] = question(fixture)
        gc.collect()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
