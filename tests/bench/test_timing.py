"""Medians, budgets and turns; no test here asserts how long anything takes."""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

import pytest

from graphopt.bench.timing import Timing, time_call, time_interleaved
from graphopt.errors import BenchmarkError


def test_a_timing_is_median_and_quartiles_in_seconds() -> None:
    timing = Timing.of([1_000, 4_000, 2_000, 3_000, 1_000_000])
    assert timing == Timing(3e-6, 2e-6, 4e-6, 1e-6, 5)
    assert timing.spread == pytest.approx(2 / 3)  # one float division and subtraction


def test_runs_are_counted_exactly_after_two_warm_ups() -> None:
    calls = []
    assert time_call(lambda: calls.append(1), runs=7).runs == 7
    assert len(calls) == 9


def test_a_budget_too_short_for_one_call_still_gives_five() -> None:
    assert time_call(lambda: sum(range(1000)), seconds=1e-9).runs == 5


@pytest.mark.parametrize(("runs", "seconds"), [(0, 1.0), (-1, 1.0), (None, 0.0), (3, -1.0)])
def test_an_empty_budget_is_an_error(runs: int | None, seconds: float) -> None:
    with pytest.raises(BenchmarkError, match=r"^(runs|seconds) is .*; it must be "):
        time_call(lambda: None, runs, seconds)
    with pytest.raises(BenchmarkError) as caught:
        Timing.of([])
    assert str(caught.value) == "nothing was timed; allow one run or more"


def test_rivals_take_turns_and_every_one_is_timed() -> None:
    order: list[str] = []
    shares: list[float] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    timings = time_interleaved(calls, seconds=0.05, progress=shares.append)
    assert set(timings) == {"a", "b", "c"}
    turns = [name for name, _ in itertools.groupby(order[3:])]
    assert len(turns) >= 6
    assert turns == (["a", "b", "c"] * len(turns))[: len(turns)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_pause_stands_before_every_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    monkeypatch.setattr(time, "sleep", order.append)
    time_interleaved({"a": lambda: order.append("a")}, seconds=0.03, pause=0.25)
    turns = [entry for entry, _ in itertools.groupby(order[1:])]
    assert turns[:4] == [0.25, "a", 0.25, "a"]


def test_a_failing_call_leaves_the_garbage_collector_on() -> None:
    with pytest.raises(ZeroDivisionError):
        time_call(lambda: 1 // 0)
    assert gc.isenabled()
