"""Pruned networks through the whole compiler: sparse kernels where they pay, planar between them, exact, small in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.artifact import Artifact
from graphopt.bench import benchmark

SIZE = 28


def prune(model: nn.Module, zeros: float, group: int) -> None:
    """Zero the smallest blocks of ``group`` neighbouring input channels of every convolution."""
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d) or layer.weight.shape[1] % group:
            continue
        weight = layer.weight.detach()
        out, width, kh, kw = weight.shape
        blocks = weight.reshape(out, width // group, group, kh, kw)
        norms = blocks.abs().sum(2, keepdim=True)
        threshold = norms.flatten().kthvalue(max(1, int(norms.numel() * zeros))).values
        layer.weight.data = (blocks * (norms > threshold)).reshape(weight.shape)


class Block(nn.Module):
    """A bottleneck, whose sum one convolution or the other carries."""

    def __init__(self, width: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.spread = nn.Conv2d(inner, inner, 3, stride, 1)
        self.expand = nn.Conv2d(inner, out, 1)
        self.short = nn.Conv2d(width, out, 1, stride) if out != width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.spread(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.short(x))


class Mixed(nn.Module):
    """Blocks, then what has no sparse kernel: a depthwise layer, concatenation, pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1)
        self.blocks = nn.Sequential(
            Block(32, 64, 128, 1), Block(128, 64, 128, 1), Block(128, 64, 256, 2)
        )
        self.depthwise = nn.Conv2d(256, 256, 3, 1, 1, groups=256)
        self.left, self.right = nn.Conv2d(256, 64, 1), nn.Conv2d(256, 64, 3, 1, 1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        x = torch.relu(self.depthwise(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        y: torch.Tensor = self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))
        return y


class Tokens(nn.Module):
    """A feed-forward block, whose rows are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.narrow(torch.relu(self.widen(x)))
        return y


def _program(zeros: float, integer: bool, batch: int = 1) -> tuple[go.Program, torch.Tensor]:
    torch.manual_seed(0)
    model = Mixed().eval()
    prune(model, zeros, 4 if integer else 1)
    x = torch.randn(batch, 3, SIZE, SIZE)
    program: go.Program = go.capture(model, (x,))
    return (go.passes.Quantize(calibration=[x])(program) if integer else program), x


@pytest.fixture(scope="module")
def integer() -> Artifact:
    return go.compile(_program(0.9, integer=True)[0], target="avx512-vnni", threads=1)


def _kernels(artifact: Artifact, kind: str) -> list[str]:
    return [k.layer for k in artifact.manifest.kernels if k.name.startswith(kind)]


def test_layers_that_are_faster_become_sparse_and_stay_planar(integer: Artifact) -> None:
    """The tensor is turned where the dense stem ends and where a dense layer reads it: nowhere between."""
    assert len(_kernels(integer, "sparse_")) >= 8
    blocks = [layer for layer in _kernels(integer, "reorder_") if layer.startswith("blocks")]
    assert blocks == ["blocks.2"]


def test_integers_are_the_programs_own(integer: Artifact, tmp_path: Path) -> None:
    _, x = _program(0.9, integer=True)
    with torch.no_grad():
        expected = integer.program(x).numpy()
    loaded = go.load(integer.save(tmp_path / "m.gopt"))
    np.testing.assert_array_equal(loaded(x.numpy()), expected)


@pytest.mark.parametrize("target", [pytest.param("avx2", marks=pytest.mark.slow), "avx512-vnni"])
def test_floats_of_a_batch(target: str) -> None:
    program, x = _program(0.93, integer=False, batch=3)
    artifact = go.compile(program, target=target, threads=2)
    assert _kernels(artifact, "sparse_f32")
    with torch.no_grad():
        expected = program(x).numpy()
    # 1e-5 of the largest output: sums in another order, and Winograd's where a layer stays dense
    error = np.abs(artifact.session()(x.numpy()) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("quantized", [True, False])
def test_linear_layers_on_tokens(quantized: bool) -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 48, 256)
    for layer in (model.widen, model.narrow):
        layer.weight.data[:, 12:] = 0
    program = go.capture(model, (x,))
    if quantized:
        program = go.passes.Quantize(calibration=[(x,)])(program)
    artifact = go.compile(program, target="avx512-vnni", threads=1)
    assert len(_kernels(artifact, "sparse_")) == 2
    with torch.no_grad():
        expected = artifact.program(x).numpy()
    actual = artifact.session()(x.numpy())
    # 1e-5: sums of floats in another order
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0 if quantized else 1e-5)


@pytest.mark.slow
def test_a_dense_network_has_no_sparse_kernel() -> None:
    artifact = go.compile(_program(0.0, integer=True)[0], threads=1)
    assert not _kernels(artifact, "sparse_")
    assert not _kernels(artifact, "reorder_")


def test_few_zeros_do_not_pay() -> None:
    artifact = go.compile(_program(0.35, integer=True)[0], target="avx512-vnni", threads=1)
    assert not _kernels(artifact, "sparse_")
    rows = [k for k in artifact.manifest.kernels if k.density is not None]
    assert rows
    assert all(0.6 < (k.density or 0) < 0.7 and k.form != "sparse" for k in rows)


def test_targets_without_sparse_kernels_stay_dense() -> None:
    artifact = go.compile(_program(0.9, integer=True)[0], target="x86-64", threads=1)
    assert not _kernels(artifact, "sparse_")


@pytest.mark.slow
def test_the_file_shrinks_with_the_zeros(integer: Artifact) -> None:
    """Values and 16-bit offsets of a tenth of the blocks: 15 % of the dense weights, and what does not shrink."""
    dense = go.compile(_program(0.0, integer=True)[0], target="avx512-vnni", threads=1)
    sizes = [sum(w.nbytes for w in a.weights.values()) for a in (integer, dense)]
    assert sizes[0] < 0.35 * sizes[1]


def test_the_benchmark_shows_both_forms(integer: Artifact) -> None:
    report = benchmark(integer.session(), (np.zeros((1, 3, SIZE, SIZE), np.float32),), seconds=0.05)
    row = next(row for row in report.to_json()["kernels"] if row["form"] == "sparse")
    assert 0.05 < row["density"] < 0.15
    assert row["sparse_gain"] > 1
    assert "dense / sparse" in report.render(width=200)
