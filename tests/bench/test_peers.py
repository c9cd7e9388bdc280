"""Peers: asked for by name, checked before anything runs, timed in turns with ours."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.bench import peers
from graphopt.bench.peers import PEERS, Subject, compare
from graphopt.errors import BenchmarkError

_X = (np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32),)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 5),
    ).eval()


def _requires(name: str) -> None:
    for package in PEERS[name].packages:
        pytest.importorskip(package, reason=f"peer {name} needs {package} (extra bench)")


@pytest.mark.filterwarnings("ignore")  # those packages' own
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Float peers reorder sums of 27 to 512 products; int8 ones quantize to 1 part in 127.
    [
        ("torch", 0),
        ("onnxruntime", 1e-5),
        ("openvino", 1e-5),
        ("onnxruntime-int8", 0.1),
        ("openvino-int8", 0.1),
    ],
)
def test_a_peer_runs_the_model(name: str, tolerance: float, tmp_path: Any) -> None:
    _requires(name)
    model = _model()
    wanted = model(torch.from_numpy(_X[0])).detach().numpy()
    subject = Subject(model, _X, [_X] * 3, 1, tmp_path)
    with peers._quiet():
        result = PEERS[name].prepare(subject)()
    result = result if isinstance(result, torch.Tensor) else next(iter(_outputs(result)))
    error = np.abs(np.asarray(result) - wanted).max() / np.abs(wanted).max()
    assert error <= tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["onnxruntime-dynamic", "openvino-int8"])
def test_int8_peers_run_linear_layers_of_a_transformer(name: str, tmp_path: Any) -> None:
    _requires(name)
    torch.manual_seed(0)
    linears = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
    model = torch.nn.Sequential(*linears).eval()
    wanted = model(torch.from_numpy(_X[0])).detach().numpy()
    subject = Subject(model, _X, [_X] * 3, 1, tmp_path, is_transformer=True)
    with peers._quiet():
        result = np.asarray(next(iter(_outputs(PEERS[name].prepare(subject)()))))
    # Int8 peers quantize to 1 part in 127, twice here.
    assert 0 < np.abs(result - wanted).max() / np.abs(wanted).max() <= 0.1


def _outputs(result: Any) -> Any:
    return result.values() if hasattr(result, "values") else result


@pytest.mark.filterwarnings("ignore")
def test_rivals_are_compared_and_a_failing_one_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject) -> Any:
        raise RuntimeError("cannot\nmore")

    monkeypatch.setattr(peers, "PEERS", {**PEERS, "broken": peers.Peer((), False, broken)})
    threads = torch.get_num_threads()
    calls: list[int] = []
    result = compare(
        {"graphopt": lambda: calls.append(1)}, ["torch", "broken"], _model(), _X, seconds=0.02
    )
    assert set(result.timings) == {"graphopt", "torch"}
    assert result.failures == {"broken": "RuntimeError: cannot"}
    assert result.versions["torch"].startswith("2.")
    assert calls
    assert torch.get_num_threads() == threads


def test_unknown_missing_and_uncalibrated_peers_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkError) as caught:
        compare({}, ["tensorflow"], _model(), _X)
    assert str(caught.value) == f"unknown peer 'tensorflow'; known are {', '.join(PEERS)}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else 1)
    with pytest.raises(BenchmarkError) as caught:
        compare({}, ["openvino"], _model(), _X)
    assert str(caught.value) == (
        "peer 'openvino' needs the package openvino: pip install 'graphopt[bench]'"
    )
    with pytest.raises(BenchmarkError) as caught:
        compare({}, ["onnxruntime-int8"], _model(), _X)
    assert str(caught.value) == ("peer 'onnxruntime-int8' quantizes and needs calibration batches")
