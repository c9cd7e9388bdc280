"""The search: what is measured next, what is believed, what a store and an interruption keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.cpu.candidates import read_choice, workload_key, write_choice
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.trial import Remote, Result
from graphopt.backends.x86.isa import ISAS
from graphopt.errors import TuneError
from graphopt.tuning.child import Child
from graphopt.tuning.store import Store, Trial
from graphopt.tuning.tuner import Tuner
from tests.backends.cpu.conv_harness import conv_workload
from tests.tuning.test_child import FAULTY

ROW = ISAS["avx2"]
LONG, SHORT = conv_workload((64, 64), (24, 24)), conv_workload((8, 16), (4, 4))


class Scripted(Child):
    """Answers at once: a candidate's ratio by its tile, and a time proportional to the workload."""

    def __init__(self, best: ConvChoice | None = None, stop_after: int = 10_000) -> None:
        super().__init__()
        self.best = best
        self.jobs: list[Any] = []
        self.stop_after = stop_after

    def start(self) -> None:
        pass

    def run(self, job: Any, limit: float) -> Any:
        if len(self.jobs) == self.stop_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        ratio = 0.8 if job.choice == self.best else 1.05
        reference = job.workload.macs * 1e-9
        return Result(reference * ratio, reference, ratio)


def tuner(path: Path, child: Child, remote: Remote | None = None) -> Tuner:
    convolutions = [(LONG, "a"), (SHORT, "b"), (LONG, "c")]
    return Tuner(convolutions, ROW, 1, "test", Store(path), remote, child)


def run(search: Tuner, budget: float = 600.0) -> None:
    search.run(budget, lambda _share, _text: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.sqlite"


def test_measures_every_candidate_once_and_the_leader_three_times(path: Path) -> None:
    best = ConvChoice(2, 3)
    child = Scripted(best)
    search = tuner(path, child)
    run(search)
    long = [job.choice for job in child.jobs if job.workload.x.height == 24]
    assert long.count(best) == 3
    chunks = {choice.chunk for choice in long if (choice.pixels, choice.vectors) == (2, 3)}
    assert len(chunks) > 3
    assert len(set(long)) == len(long) - 2
    assert search.choices() == {workload_key(LONG): best}
    report = search.report()
    assert report.complete
    assert report.geometric_mean == pytest.approx((1 / 0.8) ** 0.5)
    row = {layer.layers: layer for layer in report.layers}["a", "c"]
    assert (row.tuned_choice, row.trials) == ("2 x 3", len(long))
    assert row.tuned_seconds == pytest.approx(LONG.macs * 0.8e-9)


def test_long_layers_come_first(path: Path) -> None:
    child = Scripted(stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        run(tuner(path, child))
    assert {job.workload.x.height for job in child.jobs} == {24}


def test_goes_on_where_it_stopped(path: Path) -> None:
    first = Scripted(stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        run(tuner(path, first))
    second = Scripted()
    search = tuner(path, second)
    assert sum(len(layer.trials) for layer in search.layers) == 10
    run(search)
    assert not {(j.workload, j.choice) for j in first.jobs} & {
        (j.workload, j.choice) for j in second.jobs
    }
    third = Scripted()
    run(tuner(path, third))
    assert third.jobs == []


def test_a_leader_is_not_believed_after_one_trial(path: Path) -> None:
    search = tuner(path, Scripted())
    layer = search.layers[0]
    choice = write_choice(ConvChoice(4, 2))
    layer.trials.append(Trial(choice, "measured", 0.5, 1.0, 0.5))
    assert search.choices() == {}
    layer.trials.append(Trial(choice, "measured", 0.6, 1.0, 0.6))
    assert search.choices() == {layer.key.workload: ConvChoice(4, 2)}
    layer.trials += [Trial(choice, "measured", 1.0, 1.0, 1.0)] * 2
    assert search.choices() == {layer.key.workload: ConvChoice(4, 2)}
    layer.trials.append(Trial(choice, "measured", 1.0, 1.0, 1.0))
    assert search.choices() == {}


def test_faults_cost_one_candidate_each(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [ConvChoice(pixels, 1) for pixels in (1, 2, 3, 4)]
    monkeypatch.setattr("graphopt.tuning.tuner.candidates.candidates", lambda *_: tiles)
    monkeypatch.setattr("graphopt.tuning.tuner.candidates.refinements", lambda *_: [])
    monkeypatch.setattr("graphopt.tuning.tuner.LIMIT_SECONDS", 3.0)
    search = tuner(path, Child(FAULTY))
    (layer,) = search.layers = search.layers[:1]
    run(search)
    outcomes = [(read_choice(t.choice).pixels, t.outcome) for t in layer.trials]
    assert outcomes[:3] == [(1, "died"), (2, "too slow"), (3, "failed")]
    assert outcomes[3:] == [(4, "measured")] * 3
    assert [t.note.partition(":")[0] for t in layer.trials[:3]] == [
        "signal SIGABRT",
        "signal SIGALRM",
        "this tile is cursed",
    ]
    assert search.choices() == {layer.key.workload: ConvChoice(4, 1)}


def test_a_device_that_is_away_ends_the_search(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "graphopt.tuning.tuner.candidates.candidates", lambda *_: [ConvChoice(4, 1)]
    )
    search = tuner(path, Child(FAULTY), Remote("127.0.0.1", 1, "board"))
    with pytest.raises(TuneError) as caught:
        run(search)
    assert str(caught.value) == "layer 'a' cannot be measured: the device is away"
    assert all(not layer.trials for layer in search.layers)


def test_the_budget_ends_it(path: Path) -> None:
    child = Scripted()
    run(tuner(path, child), budget=1e-9)
    assert len(child.jobs) <= 1
