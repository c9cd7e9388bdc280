"""A run that was killed goes on from its checkpoint to the result of one that was not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from graphopt.errors import TrainError
from graphopt.train.options import Keywords
from tests.train.resume_child import main
from tests.train.tasks import capture, net, parameters_equal, sgd, task

_VARIES = ("seconds", "seconds_left")


def run(folder: Path, step: int) -> int:
    command = [sys.executable, "-m", "tests.train.resume_child", str(folder), str(step)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in _VARIES and k != "options"} for row in rows]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([13], id="inside-an-epoch"),
        pytest.param([8, 15], id="twice-once-between-epochs", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, steps: list[int]) -> None:
    """Killed by signal 9, which nothing can catch; everything that varies is in play."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    main(whole, -1)
    for step in steps:
        assert run(killed, step) == -9
    assert not (killed / "trained.pt").exists()
    main(killed, -1)
    want, have = (torch.load(folder / "trained.pt") for folder in (whole, killed))
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)
    assert log_of(whole) == log_of(killed)
    assert [row["step"] for row in log_of(killed) if row["event"] == "step"] == list(range(20))


def test_a_finished_run_is_not_repeated_and_can_be_prolonged(tmp_path: Path) -> None:
    path, program, data = tmp_path / "run.checkpoint", capture(net()), task()
    short = go.fine_tune(program, data, optimizer=sgd(), checkpoint=path)
    seen = _Counting(data)
    again = go.fine_tune(program, seen, optimizer=sgd(), checkpoint=path)
    assert seen.read == 0
    assert parameters_equal(short, again)
    assert short.history[-1].notes == again.history[-1].notes
    longer = go.fine_tune(program, seen, epochs=3, optimizer=sgd(), checkpoint=path)
    assert seen.read == 12
    assert parameters_equal(longer, go.fine_tune(program, data, epochs=3, optimizer=sgd()))


class _Counting:
    def __init__(self, data: list[Any]) -> None:
        self.data = data
        self.read = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        for batch in self.data:
            self.read += 1
            yield batch


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed is 0, not 1"),
        ({"optimizer": sgd(0.2)}, "optimizer is {"),
        ({"clip_norm": 1.0}, "clip_norm is None, not 1.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: Keywords, key: str) -> None:
    path, program = tmp_path / "run.checkpoint", capture(net())
    options: Any = {"optimizer": sgd(), "checkpoint": path}
    go.fine_tune(program, task(2), **options)
    with pytest.raises(TrainError, match=f"of another run: its {re.escape(key)}"):
        go.fine_tune(program, task(2), **{**options, **change})


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    go.fine_tune(capture(net()), task(2), checkpoint=path)
    with pytest.raises(TrainError, match="of another run: its program is"):
        go.fine_tune(capture(net(seed=1)), task(2), checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.checkpoint"
    path.write_bytes(content)
    with pytest.raises(
        TrainError, match=r"^checkpoint .* cannot be read .*; delete it to start anew$"
    ):
        go.fine_tune(capture(net()), task(2), checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    torch.save({"version": 1, "identity": {}, "state": _Harmful(tmp_path / "harm")}, path)
    with pytest.raises(TrainError, match="cannot be read"):
        go.fine_tune(capture(net()), task(2), checkpoint=path)
    assert not (tmp_path / "harm").exists()


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("option", ["checkpoint", "log"])
def test_a_folder_that_is_not_there(tmp_path: Path, option: str) -> None:
    path = tmp_path / "nowhere" / "file"
    keywords: Any = {option: path}
    with pytest.raises(
        TrainError, match=f"^{option} {re.escape(str(path))} cannot be written: No such file"
    ):
        go.fine_tune(capture(net()), task(2), **keywords)


def test_less_data_than_before(tmp_path: Path) -> None:
    path, data = tmp_path / "run.checkpoint", task(6)

    class Unsized:
        def __init__(self, count: int, fails: bool) -> None:
            self.count, self.fails = count, fails

        def __iter__(self) -> Any:
            yield from data[: self.count]
            if self.fails:
                raise KeyboardInterrupt

    options: Any = {"checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        go.fine_tune(capture(net()), Unsized(5, True), **options)
    message = "the data holds 3 batch(es) and the checkpoint was written after 5; resume with the same data"
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        go.fine_tune(capture(net()), Unsized(3, False), **options)
