"""A network through ``Prune`` 2:4, ``Quantize`` and ``compile``, run on a fake GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from graphopt.backends.cuda.toolkit import find_nvcc
from tests.backends.cuda.fake_gpu import run_on_fake

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc"),
]


def test_a_pruned_network_equals_the_program(tmp_path: Path) -> None:
    whole, half = (json.loads(line) for line in run_on_fake("fake_sparse", tmp_path))
    forms = ["mma", "mma.sp", "mma.sp", "mma.sp"]  # the stem has three inputs, all there
    assert whole == {"distance": 0, "forms": [*forms, "mma.sp", "dp4a"]}
    # 70 float16 channels do not come in fours; sums in another order may round the other way, by 2**-11 of a value
    forms = [f"{form} f16" for form in (*forms, "mma", "mma.sp")]
    assert half == {"distance": pytest.approx(0, abs=2.0**-10), "forms": forms}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_known_network(tmp_path: Path, name: str) -> None:
    (result,) = (json.loads(line) for line in run_on_fake("fake_sparse", tmp_path, name))
    assert result["distance"] == 0
    assert result["forms"].count("mma.sp") >= 14  # 9 pixels of the last stage are dp4a
