"""Trials in a SQLite file: one transaction each, so that kill -9 at any moment loses at most the trial in progress.

A row carries a checksum of its fields. One that does not hold is moved to the table ``rejects`` with a warning; a file that is
no database, or a damaged one, is renamed aside with a warning, and an empty one begun.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType

from graphopt.errors import TuneError

_LOG = logging.getLogger(__name__)

_VERSION = 1  # of the tables, in PRAGMA user_version
_BUSY_SECONDS = 30.0  # another process holds a lock for one short transaction
_TABLES = """
CREATE TABLE trials (
    workload TEXT, target TEXT, tvm TEXT, generator TEXT,
    choice TEXT, outcome TEXT, seconds REAL, reference REAL, ratio REAL, note TEXT, checksum TEXT
);
CREATE INDEX by_key ON trials (workload, target, tvm, generator);
CREATE TABLE rejects (reason TEXT, content TEXT);
CREATE TABLE workloads (workload TEXT PRIMARY KEY, description TEXT);
"""
OUTCOMES = ("measured", "failed", "died", "too slow")


@dataclass(frozen=True)
class Key:
    """What a measurement is valid for; ``target`` is the ISA row, the threads and the device."""

    workload: str
    target: str
    tvm: str
    generator: str


def target_of(isa: str, threads: int, device: str) -> str:
    """``Key.target``: ``avx2, 2 threads, AMD EPYC``."""
    return f"{isa}, {threads} threads, {device}"


@dataclass(frozen=True)
class Trial:
    """One candidate against the cost model's choice, timed in turns: seconds of both, and the median ratio of the turns.

    Where the outcome is not "measured" there are no times, and ``note`` says what happened.
    """

    choice: str
    outcome: str
    seconds: float | None = None
    reference: float | None = None
    ratio: float | None = None
    note: str = ""


_COLUMNS = ", ".join(field.name for field in (*fields(Key), *fields(Trial)))


def _checksum(key: Key, trial: Trial) -> str:
    text = json.dumps([*astuple(key), *astuple(trial)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fault(key: Key, trial: Trial, checksum: object) -> str | None:
    """Why a row is not to be believed."""
    times = (trial.seconds, trial.reference, trial.ratio)
    measured = trial.outcome == "measured"
    if trial.outcome not in OUTCOMES:
        return f"unknown outcome {trial.outcome!r}"
    if measured and not all(isinstance(t, float) and math.isfinite(t) and t > 0 for t in times):
        return f"impossible times {times}"
    if checksum != _checksum(key, trial):
        return "its checksum does not hold"
    return None


class Store:
    """An open tuning store. Raises ``TuneError`` where the file cannot be opened or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise TuneError(
                f"the tuning store {self.path} cannot be used: {error}; name another file"
            ) from error

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        fault = self._damage(database)
        if fault is None:
            return database
        database.close()
        self._set_aside(fault)
        return self._open()

    def _damage(self, database: sqlite3.Connection) -> str | None:
        """Make the tables of an empty file; what is wrong with any other that is not a whole store of this version."""
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            with _transaction(database):
                (version,) = database.execute("PRAGMA user_version").fetchone()
                (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if version == 0 and tables == 0:
                    for statement in filter(str.strip, _TABLES.split(";")):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    return f"its version is {version}, not {_VERSION}"
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            return str(error)
        return None if state == "ok" else str(state).splitlines()[-1]

    def _set_aside(self, fault: str) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):  # an old log would be replayed into the new file
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        _LOG.warning(
            "the tuning store %s is damaged (%s); it was renamed to %s and an empty one begun",
            self.path,
            fault,
            aside.name,
        )

    def add(self, key: Key, trial: Trial, description: str = "") -> None:
        """File a trial; it survives a crash from here on."""
        row = [*astuple(key), *astuple(trial), _checksum(key, trial)]
        marks = ", ".join("?" * len(row))
        with self._errors(), _transaction(self._database):
            self._database.execute(
                "INSERT OR IGNORE INTO workloads VALUES (?, ?)", (key.workload, description)
            )
            self._database.execute(
                f"INSERT INTO trials ({_COLUMNS}, checksum) VALUES ({marks})", row
            )

    def trials(self, key: Key) -> list[Trial]:
        """The trials of a key in the order they were made."""
        query = (
            f"SELECT rowid, checksum, {_COLUMNS} FROM trials "
            "WHERE workload = ? AND target = ? AND tvm = ? AND generator = ? ORDER BY rowid"
        )
        with self._errors():
            rows = self._database.execute(query, astuple(key)).fetchall()
        trials = []
        for number, checksum, *values in rows:
            trial = Trial(*values[len(fields(Key)) :])
            fault = _fault(key, trial, checksum)
            if fault is None:
                trials.append(trial)
            else:
                self._reject(number, fault, values)
        return trials

    def _reject(self, number: int, fault: str, values: list[object]) -> None:
        _LOG.warning("a trial in the tuning store %s was set aside: %s", self.path, fault)
        with self._errors(), _transaction(self._database):
            self._database.execute("INSERT INTO rejects VALUES (?, ?)", (fault, repr(values)))
            self._database.execute("DELETE FROM trials WHERE rowid = ?", (number,))


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
