"""What the measuring process and its parent say to each other: jobs come pickled on stdin, answers go pickled to stdout.

A job that crashes, aborts or hangs takes the process with it and costs one trial: an alarm with its default action ends
native code too, also where the parent is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

READY = "ready"


@dataclass(frozen=True)
class Failure:
    """A job that raised; the last line of its message. ``fatal``: no other job will do better."""

    message: str
    fatal: bool


class Unmeasurable(Exception):
    """Raised by a job where it is not the candidate's fault: the device is away, nothing can be linked."""


def serve(run: Callable[[Any], Any]) -> None:
    """Answer ``(limit in seconds, job)`` after job until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    answer(READY)
    while True:
        try:
            limit, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            result = run(job)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result = Failure(lines[-1], isinstance(error, Unmeasurable))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(result)
