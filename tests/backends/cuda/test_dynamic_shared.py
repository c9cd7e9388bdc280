"""Shared memory that a kernel may not declare: TVM's runtime raises the limit and asks for it at the launch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from graphopt.backends.cuda.toolkit import find_nvcc
from tests.backends.cuda.fake_gpu import run_on_fake


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_the_largest_tile_and_shared_steps(tmp_path: Path) -> None:
    large, deep = map(json.loads, run_on_fake("fake_shared", tmp_path))
    assert large == {"equal": True, "bytes": 3 * (256 + 128) * 64, "forms": ["mma"]}
    assert deep["equal"]
    assert deep["forms"] == ["mma / 8", "sums"]
