"""The measuring process: answers, and every way to end."""

from __future__ import annotations

import signal
import sys

import pytest

from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.trial import Job, Result
from graphopt.errors import TuneError
from graphopt.tuning.child import Child, WorkerDied
from graphopt.tuning.protocol import Failure
from tests.backends.cpu.conv_harness import conv_workload

FAULTY = (sys.executable, "-m", "tests.tuning.faulty_worker")


def job(pixels: int) -> Job:
    return Job(conv_workload((8, 16)), "avx2", 1, ConvChoice(pixels, 1), 0.01)


def test_answers_and_goes_on_after_every_fault() -> None:
    with Child(FAULTY) as child:
        assert child.run(job(4), 60) == Result(4e-3, 10e-3, 0.4)
        assert child.run(job(3), 60) == Failure("this tile is cursed", fatal=False)
        with pytest.raises(WorkerDied) as aborted:
            child.run(job(1), 60)
        assert not aborted.value.too_slow
        assert str(aborted.value).startswith("signal SIGABRT")
        with pytest.raises(WorkerDied) as slow:
            child.run(job(2), 3.0)
        assert slow.value.too_slow
        assert child.run(job(5), 60) == Result(5e-3, 10e-3, 0.5)


def test_ctrl_c_is_for_the_parent() -> None:
    with Child(FAULTY) as child:
        child.start()
        assert child._process is not None
        child._process.send_signal(signal.SIGINT)
        assert child.run(job(4), 60) == Result(4e-3, 10e-3, 0.4)


def test_a_process_that_does_not_start() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no TVM here')")
    with pytest.raises(TuneError) as caught, Child(command) as child:
        child.start()
    assert str(caught.value) == ("the measuring process cannot start: exit code 1: no TVM here")
