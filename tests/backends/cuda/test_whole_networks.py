"""Compiled networks on a fake GPU: the files that a real one would get, TVM's own runtime, the kernels interpreted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.backends.cuda.toolkit import find_nvcc
from tests.backends.cuda.fake_gpu import build_libraries

_ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_a_session_equals_the_program(tmp_path: Path) -> None:
    build_libraries(tmp_path)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.backends.cuda.fake_gpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=_ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *networks, refused = [json.loads(line) for line in done.stdout.splitlines()]
    forms = ["depthwise", "dp4a", "mma"]
    assert networks == [
        {"dynamic": dynamic, "equal": True, "forms": forms} for dynamic in (False, True)
    ]
    assert refused == (
        "model.gopt is compiled for sm_90 and this GPU is sm_80; compile the model for it"
    )
