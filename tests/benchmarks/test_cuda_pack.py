"""The folder for a GPU machine: what the peer computes, what the suite says, that a bare interpreter can load a model."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cuda.toolkit import find_nvcc
from graphopt.manifest import Kernel

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(name="pack")
def _pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(_BENCHMARKS)  # as when it is run
    import cuda_pack  # type: ignore[import-not-found]

    return cuda_pack  # type: ignore[no-any-return]


@pytest.fixture(name="suite")
def _suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(_BENCHMARKS)
    import cuda_suite  # type: ignore[import-not-found]

    return cuda_suite  # type: ignore[no-any-return]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_the_peer_computes_what_the_program_does(pack: ModuleType) -> None:
    x = torch.randn(2, 3, 9, 9)
    program = go.capture(_Net().eval(), (x,))
    names: dict[str, Any] = {}
    exec(pack.peer_source(program), names)
    network = names["Network"]()
    shapes = sorted(tuple(buffer.shape) for buffer in network.buffers())
    assert shapes == [(4,), (4, 8), (8,), (8,), (8, 3, 3, 3), (8, 8, 1, 1)]
    targets = [node.target for node in program.graph.nodes if node.op == "get_attr"]
    for buffer, target in zip(network.buffers(), dict.fromkeys(targets), strict=True):
        buffer.copy_(program.graph_module.state_dict()[target])
    with torch.no_grad():
        assert torch.equal(network(x)[0], program(x))


class _DeepNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 128, 3, 2, 1), nn.Conv2d(128, 128, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.stem(x).relu())  # type: ignore[no-any-return]


def test_a_pruned_case(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.cuda.build.find_nvcc", lambda: None)
    monkeypatch.setattr("graphopt.backends.cuda.sparse_plan._GAIN", 10.0)  # small maps gain nothing
    network = type(pack.NETWORKS["resnet18"])(
        "deep", _DeepNet, lambda _: (torch.zeros(1, 3, 9, 9),)
    )
    monkeypatch.setattr(pack, "NETWORKS", {"deep": network})
    forms = {}
    for name in ("deep", "deep-2of4"):
        pack.make_case(name, 8, "sm_80", tmp_path / name)
        file = tmp_path / "model.gopt"
        file.write_bytes(lzma.decompress((tmp_path / name / "model.gopt.xz").read_bytes()))
        kernels = go.Artifact.load(file).manifest.kernels
        forms[name] = [(kernel.form, kernel.density) for kernel in kernels if kernel.form]
    assert forms["deep"] == [("mma", None), ("mma", None)]
    assert forms["deep-2of4"] == [("mma", None), ("mma.sp", 0.5)]
    # PyTorch's float16 is timed on the same layers, without masks
    peers = [(tmp_path / name / "peer.py").read_text() for name in forms]
    assert peers[0] == peers[1]


def test_a_float16_case(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.cuda.build.find_nvcc", lambda: None)
    inputs = (torch.zeros(1, 3, 9, 9),)
    network = type(pack.NETWORKS["resnet18"])("deep", _DeepNet, lambda _: inputs)
    monkeypatch.setattr(pack, "NETWORKS", {"deep": network})
    pack.make_case("deep-float16", 8, "sm_80", tmp_path / "deep")
    file = tmp_path / "model.gopt"
    file.write_bytes(lzma.decompress((tmp_path / "deep" / "model.gopt.xz").read_bytes()))
    artifact = go.Artifact.load(file)
    assert artifact.manifest.report["precision"] == "float16"
    assert [k.form for k in artifact.manifest.kernels if k.form] == ["mma f16", "mma f16"]
    with np.load(tmp_path / "deep" / "expected.npz") as saved:
        assert saved["y"].shape == (8, 128, 5, 5)
        assert saved["tolerance"] == pack.TOLERANCE


def test_weights_have_few_values(pack: ModuleType) -> None:
    network = pack.coarse(_Net())
    for layer in (network.blocks[0], network.blocks[2], network.head):
        for channel in layer.weight.detach():
            levels = channel / channel.abs().max() * 7
            assert (levels - levels.round()).abs().max() < 1e-5
            assert len(levels.round().unique()) > 2


@pytest.mark.parametrize("per_channel", [True, False])
def test_zeros_stay(pack: ModuleType, per_channel: bool) -> None:
    """Trained networks have channels of zeros: no step divides them."""
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    assert not pack.coarse(layer, per_channel).weight[1].any()
    with torch.no_grad():
        layer.weight.zero_()
    assert not pack.coarse(layer, per_channel).weight.any()


def test_images_repeat(suite: ModuleType) -> None:
    pixels = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1)
    batch = suite.images(pixels, 5)
    assert batch.dtype == np.float32
    assert (batch[:, 0, 0, 0] * 128 + 127 == [0, 3, 0, 3, 0]).all()


def test_verdicts(suite: ModuleType) -> None:
    want = np.array([1.0, 2.0], np.float32)
    assert suite.compare(want.copy(), want) == {"equal": True, "differing": 0, "largest": 0.0}
    assert suite.compare(want[:1], want)["equal"] is False
    near = suite.compare(np.array([1.0, 2.5], np.float32), want)
    assert near == {"equal": False, "differing": 1, "largest": 0.5}
    assert not suite.is_right(near)
    given = np.array([1.0, 2.25], np.float32)
    verdicts = [suite.compare(given, want, tolerance) for tolerance in (0.125, 0.1)]
    assert [verdict["within"] for verdict in verdicts] == [True, False]
    assert [suite.is_right(verdict) for verdict in verdicts] == [True, False]
    broken = suite.compare(np.array([1.0, np.nan], np.float32), want, 0.1)
    assert not suite.is_right(broken)


def test_kernels_by_time_with_their_share_of_the_peak(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [
        SimpleNamespace(key="cuda_conv_a_kernel", count=4, device_time_total=80.0),
        SimpleNamespace(key="cuda_pool_b_kernel", count=2, device_time_total=200.0),
        SimpleNamespace(key="Memcpy HtoD", count=1, device_time_total=1.0),
    ]

    class Profile:
        def __init__(self, activities: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...
        def key_averages(self) -> list[Any]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    convolution, pooling = Kernel("cuda_conv_a", macs=1_000_000), Kernel("cuda_pool_b")
    runs: list[int] = []
    rows = suite.kernel_rows(
        lambda: runs.append(1), [convolution, convolution, pooling], 8, 8e12, runs=2
    )
    assert len(runs) == 2
    # 2 x 10**6 x 8 operations in 20 us are 0.8 tera-operations a second, a tenth of the peak
    assert rows == [
        {"kernel": "cuda_pool_b_kernel", "calls": 1, "us": 100.0},
        {
            "kernel": "cuda_conv_a_kernel",
            "calls": 2,
            "us": 20.0,
            "tops": pytest.approx(0.8),
            "share_of_peak": pytest.approx(0.1),
        },
    ]


def test_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(_BENCHMARKS / "cuda_suite.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cuda_suite: PyTorch sees no NVIDIA GPU on this machine\n"


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_a_bare_interpreter_reads_a_model(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only NumPy and typing_extensions stand beside the folder: neither torch nor TVM's compiler."""
    network = pack.NETWORKS["resnet18"]
    small = type(network)("small", lambda: _Net(), lambda _: (torch.zeros(1, 3, 9, 9),))
    monkeypatch.setattr(pack, "NETWORKS", {"small": small})
    pack.make_case("small", 5, "sm_80", tmp_path / "cases" / "small")
    pack.copy_runtime(tmp_path / "lib", [f"{sys.version_info.major}.{sys.version_info.minor}"])
    beside = tmp_path / "beside"
    beside.mkdir()
    for module in ("numpy", "typing_extensions"):
        origin = Path(str(__import__(module).__file__))
        origin = origin.parent if origin.name == "__init__.py" else origin
        for path in (origin, origin.with_name(f"{origin.name}.libs")):
            if path.exists():
                (beside / path.name).symlink_to(path)
    code = f"""
import json, lzma, pathlib, sys
sys.path[:0] = [{str(tmp_path / "lib")!r}, {str(beside)!r}]
from graphopt import artifact
from graphopt.errors import TargetError
folder = pathlib.Path({str(tmp_path / "cases" / "small")!r})
model = folder / "model.gopt"
model.write_bytes(lzma.decompress((folder / "model.gopt.xz").read_bytes()))
manifest = artifact.read_manifest(model)
try:
    artifact.load(model)
    said = ""
except TargetError as error:
    said = str(error)
print(json.dumps([manifest.target, manifest.report["device"], said, [m for m in ("torch", "tvm") if m in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    target, device, said, imported = json.loads(done.stdout)
    assert (target, device, imported) == ("sm_80", {"arch": "sm_80", "code": "cubin"}, [])
    assert said.startswith("the model is compiled for a GPU and CUDA cannot be used here")
    with np.load(tmp_path / "cases" / "small" / "expected.npz") as saved:
        assert (saved["pixels"].shape, saved["y"].shape) == ((4, 3, 9, 9), (5, 4))
