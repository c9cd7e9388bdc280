"""Which layers benchmarks/kernels.py finds in a lowered network, and what it says of them."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import kernels
from benchmarks.kernels import Layer, Row
from graphopt.backends.x86.isa import ISAS
from graphopt.bench import Timing
from graphopt.bench.networks import Network

_ISA = ISAS["sse4"]


class _Net(nn.Module):
    """A dense, a depthwise, a grouped convolution twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.again = nn.Conv2d(8, 8, 1, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.dense(x))))
        x = torch.relu(self.again(torch.relu(self.grouped(x))))
        x = self.linear(self.pool(x).flatten(1))
        return x


class _Concat(nn.Module):
    """Two convolutions that write one tensor, and one that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.both = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        x = self.both(x)
        return x


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)

    table = {
        "small": Network("Small", _Net, inputs),
        "concat": Network("Concat", _Concat, inputs),
    }
    monkeypatch.setattr(kernels, "NETWORKS", MappingProxyType(table))


def _layers(dtype: str, network: str = "small") -> list[Layer]:
    return list(kernels.layers(network, kernels.lower(network, dtype, _ISA)))


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_tensor_written_by_two_layers_is_no_kernel(dtype: str) -> None:
    names = [layer.layer.partition(",")[0] for layer in _layers(dtype, "concat")]
    assert names == ["left", "right", "both"]


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_every_convolution_and_linear_layer_is_found_with_its_kernel(dtype: str) -> None:
    found = _layers(dtype)
    names = ["dense", "depthwise", "grouped", "again", "linear"]
    assert [layer.layer.partition(",")[0] for layer in found] == names
    assert [layer.kind for layer in found] == ["conv2d", "depthwise", "conv2d", "conv2d", "linear"]
    assert [layer.macs for layer in found] == [64 * 216, 64 * 72, 64 * 32, 64 * 32, 40]
    assert {layer.dtype for layer in found} == {dtype}
    for layer in found:
        held = sum(constant.nbytes for constant in layer.constants)
        assert held < layer.bytes
        assert len(layer.buffers) == len(layer.constants) + 2  # x and y


def test_layers_of_one_shape_count_once_with_all_their_networks() -> None:
    found = _layers("float32")
    other = [dataclasses.replace(layer, network="other") for layer in found]
    kept = kernels.distinct([*found, *other])
    stems = [layer.layer.partition(",")[0] for layer, _ in kept]
    assert stems == ["dense", "depthwise", "grouped", "linear"]
    assert {names for _, names in kept} == {("small", "other")}


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_found_layers_run_beside_the_peak(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_peak", lambda isa, name: 5.0)
    calls = [kernels.build(layer, _ISA) for layer in _layers(dtype)]
    peak, timings = kernels.time_calls(calls, _ISA, dtype, seconds=1e-9)
    assert peak == 5.0
    assert [timing.runs for timing in timings] == [5] * len(calls)


def _row(name: str, macs: int, share: float, dtype: str = "int8") -> Row:
    layer = Layer("net", name, f"at.{name}", "graphopt.conv2d", dtype, macs, None, ())
    seconds = 2e-9 * macs / (share * 100.0)
    return Row(layer, ("net",), Timing(seconds, seconds, seconds, seconds, 9), 100.0)


def test_the_summary_is_of_large_convolutions_kind_by_kind() -> None:
    rows = [
        _row("conv2d_a_0", 50_000_000, 0.8),
        _row("conv2d_b_1", 80_000_000, 0.45),
        _row("conv2d_c_2", 49_999_999, 0.1),
        _row("winograd_d_3", 60_000_000, 1.5),
    ]
    assert kernels.summary(rows) == [
        "int8 conv2d, 2 convolutions with at least 50 MMAC: geometric mean 60% of peak (goal 85%), "
        "lowest 45% (goal 65%: conv2d_b, at.conv2d_b_1 of net)",
        "int8 winograd (direct-equivalent), 1 convolutions with at least 50 MMAC: geometric mean "
        "150% of peak (goal 85%), lowest 150% (goal 65%: winograd_d, at.winograd_d_3 of net)",
    ]


def test_a_row_counts_operations_and_bytes() -> None:
    layer = _layers("float32")[-1]  # 8 -> 5, weights packed for vectors of 4 lanes
    row = Row(layer, ("small",), Timing(2e-6, 2e-6, 2e-6, 1e-6, 9), 1.0)
    assert row.gops == pytest.approx(0.08)
    assert row.share == pytest.approx(0.08)
    assert row.intensity == pytest.approx(80 / layer.bytes)
    body: dict[str, Any] = row.to_json()
    assert body["kind"] == "linear"
    assert body["bytes"] == layer.bytes
