"""The measuring process: ``python -m graphopt.tuning.worker``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from graphopt.tuning.protocol import serve


def main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM imports it where it can: 2 s, for nothing here
    from graphopt.runtime import tvm_runtime

    tvm_runtime()  # first, so that its thread pool is made as in a session
    from graphopt.backends.cpu import trial, versus

    runs: dict[type, Callable[[Any], Any]] = {trial.Job: trial.run, versus.Job: versus.run}
    serve(lambda job: runs[type(job)](job))


if __name__ == "__main__":
    main()
