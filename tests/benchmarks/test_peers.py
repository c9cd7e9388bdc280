"""The tables of benchmarks/peers.py, its goals, what it measures again; nothing here asserts how long anything takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peers import Setting
from graphopt.bench.networks import NETWORKS
from graphopt.errors import BenchmarkError


def _timings(**medians: float) -> dict[str, dict[str, float]]:
    return {name.replace("_", "-"): {"median": ms / 1e3} for name, ms in medians.items()}


def _result(**medians: float) -> dict[str, Any]:
    return {
        "timings": _timings(**medians),
        "failures": {},
        "versions": {"torch": "2"},
        "machine": "M",
    }


_BOTH = {
    "graphopt_int8": 1.0,
    "graphopt": 4.0,
    "torch": 30.0,
    "onnxruntime_int8": 1.5,
    "openvino_int8": 1.2,
    "onnxruntime": 4.1,
    "openvino": 5.0,
}


def test_a_ratio_is_to_the_better_peer_of_the_same_precision() -> None:
    timings = _timings(**_BOTH)
    assert peers.ratio(timings, "int8") == pytest.approx(1.2)
    assert peers.ratio(timings, "float32") == pytest.approx(4.1 / 4.0)
    assert peers.ratio(_timings(graphopt_int8=1, torch=3), "int8") is None


def test_a_line_holds_the_times_the_ratio_and_the_goal() -> None:
    timings = _timings(**_BOTH)
    assert peers.row(Setting("vgg16", 1), "int8", timings) == [
        *("VGG-16", "30.00", "", "1.50", "", "1.20", "1.00", "1.20", "1.10", "yes")
    ]
    assert peers.row(Setting("resnet18", 1), "int8", timings)[-3:] == ["1.20", "1.30", "no"]
    assert peers.row(Setting("resnet18", 2), "float32", timings)[-3:] == ["1.02", "", ""]


def test_times_are_those_of_an_image_and_goals_those_of_batch_1_on_the_best_target() -> None:
    timings = _timings(**_BOTH)
    assert peers.row(Setting("resnet18", 1, batch=8), "float32", timings)[-4:] == [
        *("0.50", "1.02", "", "")
    ]
    assert Setting("resnet18", 1, isa="avx2").goal("int8") is None


def test_every_model_has_a_goal_for_each_column_and_a_network() -> None:
    assert set(peers.GOALS) <= set(NETWORKS)
    for goals in peers.GOALS.values():
        assert set(goals) == {("int8", 1), ("int8", 2), ("float32", 1)}


def test_tables_leave_out_what_nobody_ran() -> None:
    settings = [Setting("resnet18", 1), Setting("resnet18", 2), Setting("vgg16", 2)]
    results = {setting.key: _result(**_BOTH) for setting in settings[:2]}
    text = "\n".join(peers.tables(settings, results))
    assert "int8, 1 thread, ms an image:" in text
    assert "float32, 2 threads, ms an image:" in text
    assert "onnxruntime-dynamic" not in text
    assert "torch.compile" not in text
    assert "VGG-16" not in text
    assert "goal" in text.partition("float32, 1 thread")[2]
    assert "goal" not in text.partition("float32, 2 threads")[2]


def test_the_batch_table_compares_images() -> None:
    timings = {
        f"{label} {name}": {"median": 8e-3 if name.endswith("8") else 1e-3}
        for label in peers.OURS.values()
        for name in peers.DYNAMIC
    }
    timings["graphopt-int8 range, 8"] = {"median": 4e-3}
    setting = Setting("resnet18", 1)
    lines = peers.dynamic_table([setting], {f"{setting.key} dynamic": {"timings": timings}})
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells == [
        *("ResNet-18", "int8", "1", "1.00", "1.00 (1.00)", "1.00 (1.00)", "0.50 (2.00)")
    ]


def test_dynamic_quantization_is_for_transformers() -> None:
    names = ("torch", "onnxruntime-dynamic")
    assert peers.peers_of("resnet18", names) == ["torch"]
    assert peers.peers_of("minilm_l6", names) == ["torch", "onnxruntime-dynamic"]


def test_a_result_is_finished_when_every_peer_ran_or_failed() -> None:
    assert not peers.is_finished(None, [])
    result = {"timings": {"torch": 1}, "failures": {"openvino": "no"}}
    assert peers.is_finished(result, ["torch", "openvino"])
    assert not peers.is_finished(result, ["torch", "onnxruntime"])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``main`` measures, instead of measuring it."""
    keys: list[str] = []

    def measure(setting: Setting, seconds: float, names: list[str]) -> dict[str, Any]:
        keys.append(setting.key)
        return _result(**_BOTH)

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "available_cpus", lambda: 2)
    return keys


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib (extra bench)")
    fixed = ("--output", str(folder), "--peers", "torch")
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, *fixed])
    peers.main()


def test_an_interrupted_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[str]
) -> None:
    _run(monkeypatch, tmp_path, "--models", "resnet18")
    _run(monkeypatch, tmp_path, "--models", "resnet18,vgg16", "--threads", "1,2")
    assert measured == [
        "resnet18 native batch 1 threads 1",
        "vgg16 native batch 1 threads 1",
        "resnet18 native batch 1 threads 2",
        "vgg16 native batch 1 threads 2",
    ]
    assert set(json.loads((tmp_path / "peers.json").read_text())) == set(measured)
    _run(monkeypatch, tmp_path, "--models", "vgg16", "--fresh")
    assert measured[4:] == ["vgg16 native batch 1 threads 1"]
    assert len(json.loads((tmp_path / "peers.json").read_text())) == 4
    assert (tmp_path / "peers-batch-1.svg").read_text().startswith("<?xml")


def test_a_document_gets_the_tables_with_their_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A\n<!-- begin peers batch 1 -->\nold\n<!-- end peers batch 1 -->\nB\n")
    _run(monkeypatch, tmp_path, "--models", "resnet18", f"--document={document}")
    text = document.read_text()
    assert text.startswith("# A\n")
    assert text.endswith("\nB\n")
    assert "old" not in text
    assert "`python benchmarks/peers.py --models resnet18" in text
    assert "--document" not in text
    assert "| ResNet-18 |" in text


def test_more_threads_than_cpus_and_unknown_models_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[str]
) -> None:
    with pytest.raises(BenchmarkError) as caught:
        _run(monkeypatch, tmp_path, "--threads", "1,4")
    assert str(caught.value) == (
        "option threads: 4 threads need as many CPUs; this process may use 2"
    )
    with pytest.raises(BenchmarkError) as caught:
        _run(monkeypatch, tmp_path, "--models", "resnet19")
    assert str(caught.value) == f"unknown model 'resnet19'; known are {', '.join(NETWORKS)}"
    assert measured == []


def test_an_instruction_set_starts_the_command_anew_with_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, argv, env: started.append((argv, env)))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    peers._limit_peers("native")
    assert not started
    peers._limit_peers("avx2")
    (argv, environment), *_ = started
    assert argv[1:] == sys.orig_argv[1:]
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    for name, value in peers._LIMITS["avx2"].items():
        monkeypatch.setenv(name, value)
    peers._limit_peers("avx2")
    assert len(started) == 1
