"""Which integer layers are measured against their float forms, what is kept, what a fault costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.cpu.rivals import rivals
from graphopt.backends.cpu.trial import Result
from graphopt.backends.lower.float_fallback import Times
from graphopt.backends.x86.isa import ISAS
from graphopt.errors import TuneError
from graphopt.tuning.child import Child, WorkerDied
from graphopt.tuning.comparison import Comparison
from graphopt.tuning.protocol import Failure
from graphopt.tuning.store import Store
from tests.backends.cpu.conv_harness import conv_workload

ROW = ISAS["avx2"]
DEPTHWISE = rivals(conv_workload((16, 16), groups=16), sums_fit=False)
SMALL = rivals(conv_workload((8, 8), groups=8), sums_fit=False)
DENSE = rivals(conv_workload((64, 64), (24, 24)), sums_fit=True)  # never faster in float
LAYERS = {"small": SMALL, "dense": DENSE, "depthwise": DEPTHWISE}


class Scripted(Child):
    """Gives the same answer to every job; an exception is raised."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer or Result(8e-6, 10e-6, 0.8)
        self.jobs: list[Any] = []

    def start(self) -> None:
        pass

    def run(self, job: Any, limit: float) -> Any:
        self.jobs.append(job)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def compared(path: Path, child: Child, budget: float = 60.0, threads: int = 1) -> Comparison:
    """After a run."""
    comparison = Comparison(LAYERS, ROW, threads, "test", Store(path), None, child)
    comparison.run(budget, lambda _share, _text: None)
    return comparison


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.sqlite"


def test_what_may_be_faster_in_float_is_measured_once(path: Path) -> None:
    child = Scripted()
    comparison = compared(path, child)
    assert [job.rivals for job in child.jobs] == [DEPTHWISE, SMALL]
    assert comparison.times() == dict.fromkeys((DEPTHWISE.key, SMALL.key), Times(10e-6, 8e-6))
    again = Scripted()
    assert compared(path, again).times() == comparison.times()
    assert again.jobs == []


def test_measurements_are_of_one_target(path: Path) -> None:
    compared(path, Scripted())
    other = Scripted()
    compared(path, other, threads=2)
    assert len(other.jobs) == 2


@pytest.mark.parametrize("answer", [WorkerDied(-6, "aborted"), Failure("cursed", fatal=False)])
def test_a_fault_leaves_the_layer_without_a_time(path: Path, answer: Any) -> None:
    assert compared(path, Scripted(answer)).times() == {}
    again = Scripted()
    assert compared(path, again).times() == {}
    assert again.jobs == []


def test_a_device_that_is_away_ends_it(path: Path) -> None:
    with pytest.raises(TuneError) as error:
        compared(path, Scripted(Failure("the device is away", fatal=True)))
    assert str(error.value) == "layer 'depthwise' cannot be measured: the device is away"


def test_no_budget_measures_nothing(path: Path) -> None:
    child = Scripted()
    assert compared(path, child, budget=0.0).times() == {}
    assert child.jobs == []
