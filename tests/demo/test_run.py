"""The whole demo, and what of the issue's bar it must clear."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from graphopt.demo import run
from graphopt.demo.result import EAGER, FLOAT, INT8


@pytest.mark.slow
def test_demo_clears_the_bar(tmp_path: Path) -> None:
    result = run.run(tmp_path, lambda _label: nullcontext())
    assert (result.photos, result.crops) == (20, 240)
    assert result.int8_correct >= result.float_correct - 1
    assert result.agreement >= 0.95
    assert result.smaller >= 3.5
    assert set(result.latency) == {EAGER, FLOAT, INT8}
    assert len(result.slowest) == 5
    assert json.loads((tmp_path / run.NUMBERS).read_text()) == result.to_json()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([run.MODEL, run.NUMBERS, run.PAGE])
