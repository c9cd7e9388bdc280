"""A worker whose candidates go wrong by their register tile; a well-behaved one takes ``pixels`` milliseconds."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from graphopt.tuning.protocol import Unmeasurable, serve

sys.modules["torch"] = None  # type: ignore[assignment]  # as in the real worker: TVM imports it where it can


def run(job: Any) -> Any:
    from graphopt.backends.cpu.trial import Result

    pixels = job.choice.pixels
    if pixels == 1:
        os.abort()
    if pixels == 2:
        time.sleep(1000)
    if pixels == 3:
        raise RuntimeError("first line\nthis tile is cursed")
    if job.remote is not None:
        raise Unmeasurable("the device is away")
    print("noise on stdout")
    return Result(pixels * 1e-3, 10e-3, pixels / 10)


if __name__ == "__main__":
    serve(run)
