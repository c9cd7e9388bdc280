"""``compile`` for a GPU: which kernels, what the manifest says, and what happens where no compiler or no GPU is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cuda import build
from graphopt.backends.cuda.toolkit import find_nvcc
from graphopt.errors import CompileError, TargetError


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(name="program", scope="module")
def _program() -> go.Program:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    return go.passes.Quantize(calibration=[(x,)])(go.capture(_Net().eval(), (x,)))


def _without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)


def test_source_goes_into_the_file_where_there_is_no_compiler(
    program: go.Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _without_nvcc(monkeypatch)
    artifact = go.compile(program, "h100")
    assert artifact.manifest.target == "sm_90"
    assert artifact.manifest.gpu == "sm_90"
    assert artifact.manifest.report["device"] == {"arch": "sm_90", "code": "source"}
    assert [(k.operator, k.form) for k in artifact.manifest.kernels] == [
        ("graphopt.quantize", ""),
        ("graphopt.conv2d", "mma"),
        ("graphopt.global_avg_pool", ""),
        ("graphopt.linear_dequantize", "dp4a"),
    ]
    assert b"__global__" in artifact.library
    file = artifact.save(tmp_path / "model.gopt")
    assert go.Artifact.load(file).manifest.report["device"]["code"] == "source"


def test_two_compilations_give_the_same_bytes(
    program: go.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_nvcc(monkeypatch)
    first, second = (go.compile(program, "sm_80").members() for _ in range(2))
    assert first["model.so.zlib"] == second["model.so.zlib"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_cuda(program: go.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_nvcc(monkeypatch)
    artifact = go.compile(program, "sm_80")
    with pytest.raises(TargetError, match="install NVIDIA's driver"):
        artifact.session()


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None and importlib.util.find_spec("ziglang") is None,
    reason="needs a compiler for aarch64",
)
def test_a_board(program: go.Program) -> None:
    artifact = go.compile(program, "jetson-orin")
    assert artifact.manifest.report["device"] == {"arch": "sm_87", "code": "cubin"}
    assert artifact.library[18:20] == b"\xb7\x00"  # ELF's e_machine: aarch64
    with pytest.raises(TargetError, match="aarch64"):
        artifact.session()


def test_nothing_is_tuned(program: go.Program) -> None:
    with pytest.raises(CompileError) as caught:
        go.compile(program, "sm_80", tune="1s")
    assert str(caught.value) == (
        "target sm_80: nothing is tuned for GPUs yet; leave the options tune and tuning out"
    )


def test_a_float_network(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_nvcc(monkeypatch)
    program = go.capture(_Net().eval(), (torch.randn(1, 3, 8, 8),))
    artifact = go.compile(program, "sm_86")
    assert [kernel.name.split("_")[1] for kernel in artifact.manifest.kernels if kernel.macs] == [
        "float",
        "float",
    ]


def test_elements_that_int32_does_not_number() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = go.capture(_Net().eval(), (x,), dynamic_batch=(1, 2**22))
    with pytest.raises(CompileError) as caught:
        go.compile(program, "sm_80")
    assert str(caught.value) == (
        "node 'relu': a tensor of 4194304 x (8, 8, 8) elements has 2**31 or more; compile a smaller batch"
    )
