"""``go.tune`` and ``go.compile(tune=, tuning=)`` on a small network; the measuring itself is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.targets import TARGETS
from graphopt.errors import TargetError, TuneError
from graphopt.tuning.search import Search
from graphopt.tuning.tuner import Tuner
from tests.tuning.patience import until

TARGET = "x86-64"  # every machine that runs the tests has it


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(x: torch.Tensor) -> go.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU(), nn.Conv2d(8, 24, 2), nn.ReLU(), nn.Flatten())
    program = go.capture(net.eval(), (x,))
    return go.passes.Quantize(calibration=[x])(program)


def test_tunes_then_compiles_with_the_winners(
    quantized: go.Program, x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "t.sqlite"
    report = until(
        lambda report: bool(report.outcomes.get("measured")),
        lambda: go.tune(quantized, TARGET, "4s", threads=1, tuning=store),
    )
    assert len(report.layers) == 2
    assert set(report.outcomes) == {"measured"}
    forced = {}

    def choices(self: Tuner) -> dict[str, ConvChoice]:
        """A different tile for each layer, whatever was faster."""
        forced.update({layer.key.workload: ConvChoice(2, 1, 3) for layer in self.layers})
        return forced

    monkeypatch.setattr(Tuner, "choices", choices)
    artifact = go.compile(quantized, TARGET, threads=1, tuning=str(store))
    plain = go.compile(quantized, TARGET, threads=1)
    assert len(forced) == 2
    names = [{kernel.name for kernel in a.manifest.kernels} for a in (artifact, plain)]
    assert len(names[0] - names[1]) == 2
    for a in (artifact, plain):
        np.testing.assert_array_equal(a.session()(x.numpy()), a.program(x).detach().numpy())
    assert "tuning" not in plain.manifest.report
    assert artifact.manifest.report["tuning"]["geometric_mean"] == round(report.geometric_mean, 4)


def test_compile_measures_within_its_budget(quantized: go.Program, tmp_path: Path) -> None:
    store = tmp_path / "t.sqlite"
    artifact = until(
        lambda artifact: any(layer.trials for layer in artifact.report.tuning.layers),
        lambda: go.compile(quantized, TARGET, tune="2s", threads=1, tuning=go.Tuning(store)),
    )
    assert {"tune", "kernels", "codegen"} <= set(artifact.report.stages)


def test_the_store_is_touched_only_when_asked(
    quantized: go.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    go.compile(quantized, TARGET, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_early_and_stops_a_compilation(
    quantized: go.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "run", interrupt)
    report = go.tune(quantized, TARGET, "9s", threads=1, tuning=tmp_path / "t.sqlite")
    assert report.interrupted
    assert not report.complete
    with pytest.raises(KeyboardInterrupt):
        go.compile(quantized, TARGET, tune="9s", threads=1, tuning=tmp_path / "t.sqlite")


def test_refuses_what_cannot_be_measured_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "none.sqlite"
    with pytest.raises(TuneError) as caught:
        Search(TARGETS[TARGET], 1, missing, None)
    assert str(caught.value) == (
        f"the tuning store {missing} does not exist; measure first, with tune or graphopt tune"
    )
    with pytest.raises(TuneError) as elsewhere:
        Search(TARGETS[TARGET], 1, go.Tuning(missing, key="board"), "30s")
    assert str(elsewhere.value) == (
        "device 'board' cannot be measured without its RPC tracker; name it with rpc"
    )
    monkeypatch.setattr("graphopt.backends.targets.Target.missing", lambda _: ("avx2", "fma"))
    with pytest.raises(TargetError) as lacking:
        Search(TARGETS["avx2"], 1, missing, "30s")
    assert str(lacking.value) == (
        "target 'avx2' cannot be tuned here: this CPU lacks avx2, fma; name a device with rpc and key"
    )
    Search(TARGETS["avx2"], 1, go.Tuning(missing, "127.0.0.1:9190", "board"), "30s")


def test_a_dynamic_batch_takes_what_was_measured_at_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = go.capture(nn.Linear(16, 40), (torch.randn(2, 16),), dynamic_batch=(1, 4))
    report = go.tune(program, TARGET, "1s", threads=1, tuning=tmp_path / "t.sqlite")
    assert [layer.shape for layer in report.layers] == ["float32 1x1x16 -> 40, 1x1"]
    go.compile(program, TARGET, threads=1, tuning=tmp_path / "t.sqlite")
