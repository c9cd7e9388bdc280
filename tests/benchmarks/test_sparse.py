"""What benchmarks/sparse.py and benchmarks/sparse_networks.py compare, count and keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from benchmarks import sparse, sparse_networks
from benchmarks.sparse import Row
from benchmarks.sparse_networks import Case
from graphopt.backends.cpu.sparse_pack import density
from graphopt.backends.x86.isa import ISAS
from graphopt.bench.networks import Network
from graphopt.bench.report import machine_name
from graphopt.errors import BenchmarkError


def _row(layer: str, zeros: float, dense: float, direct: float, kind: str = "direct") -> Row:
    return Row(layer, "int8", "block", zeros, 1 - zeros, dense, direct, 1.0, 2.0, kind)


@pytest.mark.parametrize(("pattern", "expected"), [("block", 0.2), ("element", 0.59)])
def test_weights_hold_the_zeros_that_are_asked_for(pattern: str, expected: float) -> None:
    """1 - 0.8**4 of the blocks hold something where a fifth of the weights does."""
    workload = sparse.workload_of("1x1 256-128 @56", "int8")
    weight = sparse.weight_of(workload, "int8", pattern, 0.8)
    assert density(weight) == pytest.approx(expected, abs=0.01)


def test_the_means_against_the_compilers_choice_and_against_direct_kernels() -> None:
    rows = [_row("a", 0.8, 2.0, 2.0), _row("b", 0.8, 4.5, 8.0, "winograd"), _row("a", 0.9, 5, 5)]
    lines = sparse.table(rows)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:]]
    assert cells[0] == ["geometric mean", "int8", "block", "", "", "3.00", "5.00"]
    assert cells[1] == ["against direct kernels", "int8", "block", "", "", "4.00", "5.00"]


def test_rows_of_an_older_form_are_measured_again(tmp_path: Path) -> None:
    isa, path = ISAS["avx2"], tmp_path / "sparse.json"
    rows = [_row("a", 0.8, 2.0, 2.0)]
    sparse._write(path, isa, rows)
    assert sparse._read(path, isa) == rows
    body = json.loads(path.read_text())
    del body["rows"][0]["direct"]
    path.write_text(json.dumps(body))
    assert sparse._read(path, isa) == []
    assert body["machine"] == machine_name()


def _network(monkeypatch: pytest.MonkeyPatch) -> Case:
    def build() -> nn.Module:
        layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1])

    x = torch.rand((1, 64, 28, 28), generator=torch.Generator().manual_seed(0))
    networks = {"two": Network("Two", build, lambda _: (x,))}
    monkeypatch.setattr(sparse_networks, "NETWORKS", networks)
    return Case("two", 0.95, "avx2", 1)


def test_a_network_is_compiled_twice_and_both_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _network(monkeypatch)
    row = sparse_networks.measure(case, tmp_path, seconds=0.01)
    assert (row["sparse_layers"], row["layers"]) == (2, 2)
    assert row["bytes"]["sparse"] < 0.2 * row["bytes"]["dense"]
    assert row["gain"] == pytest.approx(
        row["milliseconds"]["dense"] / row["milliseconds"]["sparse"]
    )
    assert "| Two " in sparse_networks.table([row])[-1]


def test_files_that_disagree_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _network(monkeypatch)
    sparse_networks.pruned.cache_clear()
    paths = case.compiled(tmp_path)
    other = sparse_networks.pruned("two", 0.95)
    weight = next(name for name in other.graph_module.state_dict() if "weight" in name)
    with torch.no_grad():
        other.graph_module.state_dict()[weight].mul_(np.float32(-1))
    go.compile(other, "avx2", threads=1).save(paths["dense"])
    with pytest.raises(BenchmarkError, match="outputs of the sparse and the dense file differ"):
        sparse_networks.measure(case, tmp_path, seconds=0.01)
    sparse_networks.pruned.cache_clear()
