"""The pictures of the benchmarks name what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.bench import charts

pytest.importorskip("matplotlib", reason="charts need matplotlib (extra bench)")


def test_bars_name_models_and_rivals(tmp_path: Path) -> None:
    path = tmp_path / "bars.svg"
    latencies = {"Net": {"graphopt": 1.0, "other": 2.0}, "Second": {"graphopt": 1.0}}
    charts.bar_chart(path, {"int8": latencies, "float32": latencies})
    text = path.read_text()
    assert all(word in text for word in ("Net", "Second", "other", "2.00", "float32"))


def test_a_roofline_names_its_roofs_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "roofline.svg"
    points = [charts.Point(0.5, 10.0, "linear"), charts.Point(50.0, 90.0, "conv2d")]
    charts.roofline(path, [(charts.Roofs("int8", 100.0, {"L2": 50.0, "memory": 5.0}), points)])
    text = path.read_text()
    assert all(word in text for word in ("peak: 100 GOPS", "L2: 50 GB/s", "conv2d", "linear"))
