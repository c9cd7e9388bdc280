"""Compiled networks on a fake GPU: the files that a real one would get, TVM's own runtime, the kernels interpreted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.cuda.toolkit import find_nvcc
from tests.backends.cuda.fake_gpu import run_on_fake

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc"),
]


def _lines(folder: Path, *names: str) -> list[Any]:
    return [json.loads(line) for line in run_on_fake("fake_gpu", folder, *names)]


def test_a_session_equals_the_program(tmp_path: Path) -> None:
    *networks, floats, refused = _lines(tmp_path)
    forms = ["depthwise", "dp4a", "mma"]
    assert networks == [
        {"network": name, "equal": True, "forms": forms} for name in ("fixed", "dynamic", "signed")
    ]
    assert floats == {"network": "float", "close": True}  # sums of 180 products, to 1e-5
    assert refused == (
        "model.gopt is compiled for sm_90 and this GPU is sm_80; compile the model for it"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2", "resnet18"])
def test_a_known_network(tmp_path: Path, name: str) -> None:
    (result,) = _lines(tmp_path, name)
    assert result["equal"]
