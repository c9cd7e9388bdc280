"""A store survives kill -9, damaged rows and damaged files."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import TuneError
from graphopt.tuning.store import Key, Store, Trial

KEY = Key("w", "avx2, 1 threads, this", "0.27", "g1")
TRIAL = Trial("a", "measured", 1e-3, 2e-3, 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tuning.sqlite"


def damage(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


def count(path: Path, table: str) -> int:
    database = sqlite3.connect(path)
    (number,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    database.close()
    return int(number)


def test_keeps_trials_by_key(path: Path) -> None:
    others = [Key("v", *KEY_REST), Key("w", "x", "0.27", "g1"), Key("w", *KEY_REST[:2], "g2")]
    died = Trial("b", "died", note="signal SIGABRT: LLVM ERROR")
    with Store(path) as store:
        store.add(KEY, TRIAL, "a convolution")
        for other in others:
            store.add(other, died)
        store.add(KEY, died)
    with Store(path) as store:
        assert store.trials(KEY) == [TRIAL, died]
        assert store.trials(others[2]) == [died]
        assert store.trials(Key("w", *KEY_REST[:1], "0.28", "g1")) == []


KEY_REST = (KEY.target, KEY.tvm, KEY.generator)

WRITER = """
import sys
from pathlib import Path
from graphopt.tuning.store import Key, Store, Trial
with Store(Path(sys.argv[1])) as store:
    for number in range(100_000):
        store.add(Key("w", "t", "0.27", "g"), Trial(str(number), "measured", 1.0, 1.0, 1.0))
        print(number, flush=True)
"""


def test_kill_loses_no_finished_trial(path: Path) -> None:
    for _ in range(3):
        with Store(path) as store:
            before = len(store.trials(Key("w", "t", "0.27", "g")))
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        finished = [next(process.stdout) for _ in range(20)]
        process.kill()
        finished += process.communicate()[0].splitlines()
        with Store(path) as store:
            kept = store.trials(Key("w", "t", "0.27", "g"))[before:]
        whole = [line.strip() for line in finished if line.strip()]
        assert len(whole) - 1 <= len(kept) <= len(whole) + 1
        assert [trial.choice for trial in kept] == [str(n) for n in range(len(kept))]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("seconds = 0.1", "its checksum does not hold"),
        ("choice = 'other'", "its checksum does not hold"),
        ("checksum = NULL", "its checksum does not hold"),
        ("seconds = -1.0", "impossible times (-1.0, 0.002, 0.5)"),
        ("ratio = 'fast'", "impossible times (0.001, 0.002, 'fast')"),
        ("outcome = 'perfect'", "unknown outcome 'perfect'"),
    ],
)
def test_a_damaged_row_is_set_aside(
    path: Path, change: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(path) as store:
        store.add(KEY, TRIAL)
        store.add(KEY, Trial("b", "failed", note="no"))
    damage(path, f"UPDATE trials SET {change} WHERE rowid = 1")
    with Store(path) as store, caplog.at_level(logging.WARNING):
        assert [trial.choice for trial in store.trials(KEY)] == ["b"]
        assert caplog.messages == [f"a trial in the tuning store {path} was set aside: {reason}"]
        store.trials(KEY)
        assert len(caplog.messages) == 1
    assert (count(path, "trials"), count(path, "rejects")) == (1, 1)


def _text(path: Path) -> None:
    path.write_text("no database " * 100)


def _overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _other_version(path: Path) -> None:
    damage(path, "PRAGMA user_version = 99")


@pytest.mark.parametrize("harm", [_text, _overwritten, _truncated, _other_version])
def test_a_damaged_file_is_renamed(path: Path, harm, caplog: pytest.LogCaptureFixture) -> None:
    with Store(path) as store:
        for number in range(50):
            store.add(KEY, Trial(str(number), "measured", 1.0, 1.0, 1.0))
    harm(path)
    harmed = path.read_bytes()
    with caplog.at_level(logging.WARNING), Store(path) as store:
        assert store.trials(KEY) == []
        store.add(KEY, TRIAL)
    assert "it was renamed to tuning.sqlite.damaged-1 and an empty one begun" in caplog.messages[0]
    assert path.with_name("tuning.sqlite.damaged-1").read_bytes() == harmed
    harm(path)
    with Store(path) as store:
        assert store.trials(KEY) == []
    assert path.with_name("tuning.sqlite.damaged-2").exists()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with Store(path) as store:
        store.add(KEY, TRIAL)
        assert store.trials(KEY) == [TRIAL]


def test_two_processes_share_a_store(path: Path) -> None:
    with Store(path) as one, Store(path) as other:
        one.add(KEY, TRIAL)
        other.add(KEY, TRIAL)
        assert one.trials(KEY) == other.trials(KEY) == [TRIAL, TRIAL]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuneError) as caught:
        Store(tmp_path)
    assert str(caught.value) == (
        f"the tuning store {tmp_path} cannot be used: unable to open database file; name another file"
    )
