"""Which layers benchmarks/low_rank.py finds, what it compiles once, and what it counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import graphopt as go
from benchmarks import low_rank
from benchmarks.low_rank import Case, Shape


def test_the_distinct_layers_of_a_network() -> None:
    found = [str(shape) for shape in low_rank.shapes("resnet18")]
    assert len(found) == len(set(found)) == 12
    assert found[0] == "7x7 3->64 /2 at 224x224"
    assert "1x1 64->128 /2 at 56x56" in found
    assert found[-1] == "linear 512->1000"


def test_depthwise_layers_are_left_out() -> None:
    kernels = {shape.kernel for shape in low_rank.shapes("mobilenet_v2")}
    assert kernels == {(3, 3), (1, 1), ()}  # 3 x 3 is the first layer's


def test_factorizations_that_apply() -> None:
    spatial = Shape(16, 16, (3, 3), (1, 1), (1, 1), (8, 8))
    pointwise = Shape(16, 16)
    passes = ["low-rank-linear", "spatial-svd", "tucker-conv"]
    names = [case.factorization for case in low_rank.cases(spatial, "int8", passes, [0.5])]
    assert names == ["spatial-svd", "tucker-conv"]
    (case,) = low_rank.cases(pointwise, "int8", passes, [0.5])
    assert case.factorization == "low-rank-linear"


def test_means_leave_out_small_ratios() -> None:
    def row(ratio: float, efficiency: float, precision: str = "int8") -> dict[str, object]:
        return {"macs_ratio": ratio, "efficiency": efficiency, "precision": precision, "pass": "p"}

    found = low_rank.means([row(1.9, 0.1), row(2.0, 0.4), row(4.0, 0.9), row(3.0, 1.0, "float32")])
    assert found == {
        "all": pytest.approx((0.4 * 0.9) ** (1 / 3)),
        "float32": 1.0,
        "float32 p": 1.0,
        "int8": pytest.approx(0.6),
        "int8 p": pytest.approx(0.6),
    }


def test_a_layer_is_compiled_once_and_measured(tmp_path: Path) -> None:
    shape = Shape(32, 32, (3, 3), (1, 1), (1, 1), (8, 8))
    whole, factored = Case(shape, "float32"), Case(shape, "float32", "tucker-conv", 0.4)
    first, second = whole.compiled(tmp_path), factored.compiled(tmp_path)
    assert first is not None
    assert second is not None
    stamp = first.stat().st_mtime_ns
    assert whole.compiled(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    row = low_rank.measure(factored, first, second)
    assert row["macs"][0] == 8 * 8 * 32 * 32 * 9
    assert row["macs_ratio"] >= 2.5
    assert len(row["kernels"][1]) == 3
    ratio = row["seconds"][0] / row["seconds"][1] / row["macs_ratio"]
    assert math.isclose(row["efficiency"], ratio)
    assert row["rank"] == go.load(second).manifest.history[0]["layers"][0]["text"][5:]


def test_a_declined_layer_is_remembered(tmp_path: Path) -> None:
    case = Case(Shape(4, 4), "float32", "low-rank-linear", 0.01)
    assert case.compiled(tmp_path) is None
    (note,) = tmp_path.iterdir()
    assert "cannot be reached" in note.read_text()
    assert case.compiled(tmp_path) is None
