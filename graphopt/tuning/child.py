"""The parent's side of the worker: start it, hand it a job, tell how it ended."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from graphopt.errors import TuneError
from graphopt.tuning.protocol import READY

COMMAND = (sys.executable, "-m", "graphopt.tuning.worker")


class WorkerDied(Exception):
    """The child process ended in the middle of a job; ``too_slow`` where its alarm did it."""

    def __init__(self, code: int, last_words: str) -> None:
        self.too_slow = code == -signal.SIGALRM
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        super().__init__(f"{reason}: {last_words}" if last_words else reason)


class Child:
    """A worker process, started at the first job and again after it died. Use as a context manager."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Bring the worker up; its imports take seconds, which should not count as a trial's."""
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open while the worker lives
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        try:
            ready = self._read()
        except WorkerDied as error:
            raise TuneError(f"the measuring process cannot start: {error}") from error
        if ready != READY:
            raise TuneError(f"the measuring process says {ready!r} in place of {READY!r}")

    def run(self, job: Any, limit: float) -> Any:
        """The worker's answer; raises ``WorkerDied``."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead; reading says how
            pickle.dump((limit, job), self._process.stdin)
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            words = self._last_words()
            self.stop()
            raise WorkerDied(code, words) from None

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a job that nobody read
                    pipe.close()
        self._errors.close()
        self._process = None
