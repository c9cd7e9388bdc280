"""The compression benchmark: what a row is held to, what the table says, and one row from rewrite to compiled file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from graphopt import registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("compression")
    sys.path.remove(str(BENCHMARKS))


def _result(compiled: float, parameters: int = 100, macs: int = 1000) -> dict[str, float]:
    return {
        "rewritten": 50.0,
        "recovered": compiled,
        "compiled": compiled,
        "parameters": parameters,
        "macs": macs,
        "bytes": 2048,
        "microseconds": 40.0,
    }


def test_a_goal_is_accuracy_parameters_and_macs(benchmark: Any) -> None:
    whole = _result(92.0)
    recipes = importlib.import_module("recipes")
    row = recipes.Row("r", lambda bench: bench.network, None, recipes.Goal(0.5, 0.1, 0.5))
    assert str(row.goal) == "-0.5, 10x fewer parameters, 2x fewer MACs"
    assert benchmark.verdict(row, _result(91.5, 11, 500), whole) == "yes"
    assert benchmark.verdict(row, _result(91.4, 11, 500), whole) == "no"
    assert benchmark.verdict(row, _result(91.5, 12, 500), whole) == "no"
    assert benchmark.verdict(row, _result(91.5, 11, 502), whole) == "no"


def test_the_table_has_a_line_for_each_finished_row(benchmark: Any) -> None:
    results = {"float": {**_result(92.0), "microseconds": 80.0}, "int8": _result(91.9)}
    *_, whole, integer = benchmark.table(results)
    assert [cell.strip() for cell in whole.split("|")[1:4]] == ["whole network", "50.00", "92.00"]
    assert [cell.strip() for cell in integer.split("|")[8:10]] == ["40", "2.00"]


def test_every_family_has_a_row(benchmark: Any) -> None:
    for name, pass_ in registry.all_passes().items():
        if pass_.__module__.startswith(("graphopt.passes.factorize.", "graphopt.passes.compact.")):
            assert name in benchmark.ROWS


def test_every_row_is_on_the_page_of_its_family(benchmark: Any) -> None:
    shown = {"float"}
    for page, sections in benchmark.PAGES.items():
        text = (BENCHMARKS.parent / "docs" / page).read_text()
        assert all(f"<!-- begin {section} -->" in text for section in sections), page
        shown.update(*sections.values())
    assert shown == set(benchmark.ROWS)


@pytest.fixture
def bench(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A few made-up images and a network that has learned nothing."""
    fashion, recipes = importlib.import_module("fashion"), importlib.import_module("recipes")
    torch.manual_seed(0)
    images = fashion.Images(torch.randn(750, 1, 28, 28), torch.randint(0, 10, (750,)))
    monkeypatch.setattr(fashion.Images, "read", classmethod(lambda cls, kind: images))
    network = go.capture(fashion.FashionNet().eval(), (images.pixels[:2],), dynamic_batch=(1, 256))
    monkeypatch.setattr(recipes, "trained", lambda folder: network)
    return recipes.Bench(tmp_path, epochs=1)


def test_a_row_goes_from_rewrite_to_compiled_file(benchmark: Any, bench: Any) -> None:
    result = benchmark.measure(bench, "int8")
    assert result["difference"] == 0
    assert result["macs"] * 2 == bench.network.stats().macs
    assert result["bytes"] == (bench.folder / "int8.gopt").stat().st_size
    assert set(benchmark.time_all(bench, ["int8"])) == {"int8"}
    again = benchmark.compiled(bench, "int8")  # from what was kept
    assert (again["compiled"], again["difference"]) == (result["compiled"], 0)
    taught = importlib.import_module("recipes").Compiled(bench.folder / "int8.gopt")
    assert taught(bench.test.pixels[:3]).shape == (3, 10)


def test_a_row_that_prunes_gradually_reaches_its_sparsity(benchmark: Any, bench: Any) -> None:
    """However few steps there are; and what has finished is not trained again."""
    bench.teacher = bench.network  # not compiled: time
    row = benchmark.ROWS["prune-block"]
    first = row.recovered(bench, "prune-block", row.make(bench))
    held = sum(p.numel() for p in bench.network.graph_module.parameters())
    assert 0.2 < first.stats().nonzero / held < 0.21
    checkpoint = bench.folder / "prune-block.checkpoint"
    before = checkpoint.stat().st_mtime_ns
    again = row.recovered(bench, "prune-block", row.make(bench))
    assert torch.equal(*(program(bench.test.pixels[:2]) for program in (first, again)))
    assert checkpoint.stat().st_mtime_ns == before


def test_a_missing_dataset_names_the_package(benchmark: Any, tmp_path: Path) -> None:
    fashion = importlib.import_module("fashion")
    with pytest.raises(go.errors.BenchmarkError) as error:
        fashion.Images.read("train", tmp_path)
    assert str(error.value) == (
        f"Fashion-MNIST is not in {tmp_path}; apt-get install dataset-fashion-mnist"
    )
