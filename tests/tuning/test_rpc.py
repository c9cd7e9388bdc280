"""A remote device: TVM's own tracker and server on the loopback interface, and the command that tunes there."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cpu.trial import Remote
from graphopt.backends.targets import resolve
from graphopt.backends.x86.isa import ISAS
from graphopt.errors import TuneError
from graphopt.tuning.search import Search
from graphopt.tuning.store import Store
from graphopt.tuning.tuner import Tuner
from tests.backends.cpu.conv_harness import conv_workload
from tests.tuning.patience import until

pytest.importorskip("tornado", reason="the tracker needs the extra graphopt[rpc]")

KEY = "board"
HOST = "127.0.0.1"
_PATIENCE = 120.0  # imports of both processes on a busy machine


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _process(module: str, *arguments: object) -> Iterator[None]:
    """A process and all it starts, until the block ends."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _registered(port: int) -> bool:
    """In a process of its own: TVM's client leaves sockets open, which ``-W error`` minds."""
    query = [
        sys.executable,
        "-m",
        "tvm.exec.query_rpc_tracker",
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    return KEY in subprocess.run(query, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def tracker() -> Iterator[int]:
    """The port of a tracker at which one server is registered."""
    port, serving = _free_port(), _free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _process("tvm.exec.rpc_tracker", "--host", HOST, "--port", port, "--port-end", port + 1)
        )
        stack.enter_context(
            _process(
                "tvm.exec.rpc_server",
                *("--host", HOST, "--port", serving, "--port-end", serving + 1),
                *("--tracker", f"{HOST}:{port}", "--key", KEY),
            )
        )
        stop = time.monotonic() + _PATIENCE
        while not _registered(port):
            assert time.monotonic() < stop, "the server did not register"
            time.sleep(1.0)
        yield port


def _tuner(store: Store, remote: Remote) -> Tuner:
    row = ISAS["sse4"]
    return Tuner([(conv_workload((8, 16), (4, 4)), "a")], row, 1, "device board", store, remote)


def _stop_after(count: int) -> Callable[[float, str], None]:
    calls = itertools.count()

    def progress(_share: float, _text: str) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt

    return progress


def test_measures_on_the_device(tracker: int, tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite") as store:
        tuner = _tuner(store, Remote(HOST, tracker, KEY))
        with contextlib.suppress(KeyboardInterrupt):
            tuner.run(_PATIENCE, _stop_after(3))
        trials = store.trials(tuner.layers[0].key)
    assert trials == tuner.layers[0].trials
    assert len(trials) == 3
    assert {(trial.outcome, trial.note) for trial in trials} == {("measured", "")}
    assert tuner.layers[0].key.target == "sse4, 1 threads, device board"


def test_one_call_tunes_there(tracker: int, tmp_path: Path) -> None:
    """On the key's behalf: the measurements of a device are those that a compilation for it finds."""
    program = go.capture(nn.Linear(16, 24), (torch.zeros(1, 16),))
    device = go.Tuning(tmp_path / "t.sqlite", f"{HOST}:{tracker}", KEY)
    report = until(
        lambda report: bool(report.outcomes.get("measured")),
        lambda: go.tune(program, "x86-64", "15s", threads=1, tuning=device),
    )
    for key, trials in ((KEY, report.layers[0].trials), (None, 0)):
        lookup = Search(
            resolve("x86-64"), 1, go.Tuning(tmp_path / "t.sqlite", key=key), budget=None
        )
        assert lookup.run(program)[1].layers[0].trials == trials


def test_a_device_that_nobody_registered(tracker: int, tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite") as store:
        tuner = _tuner(store, Remote(HOST, tracker, "phone"))
        with pytest.raises(TuneError) as caught:
            tuner.run(30.0, lambda *_: None)
        assert store.trials(tuner.layers[0].key) == []
    assert str(caught.value) == (
        "layer 'a' cannot be measured: no device of key 'phone' is registered at the tracker"
    )


def test_a_tracker_that_is_not_there(tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite") as store:
        port = _free_port()
        tuner = _tuner(store, Remote(HOST, port, KEY))
        with pytest.raises(TuneError) as caught:
            tuner.run(30.0, lambda *_: None)
        assert store.trials(tuner.layers[0].key) == []
    assert str(caught.value) == (
        f"layer 'a' cannot be measured: no RPC tracker answers at {HOST}:{port} (Connection refused)"
    )
