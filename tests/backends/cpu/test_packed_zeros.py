"""Weights of many zeros: smaller in the file, whole in memory."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import nn

import graphopt as go
from graphopt.backends.cpu.packed_zeros import is_worth, pack, unpacker
from graphopt.backends.isas import ISAS
from graphopt.backends.targets import resolve
from graphopt.passes.prune.schedules import PerLayer

SIZE = 4096


def _weight(nonzero: int, at: str = "random") -> Any:
    """int8 with so many values that are not zero: anywhere, or at an end."""
    rng = np.random.default_rng(nonzero)
    values = rng.integers(1, 128, nonzero) * rng.choice([-1, 1], nonzero)
    weight = np.zeros(SIZE, np.int8)
    places = {
        "random": rng.choice(SIZE, nonzero, replace=False),
        "first": np.arange(nonzero),
        "last": np.arange(SIZE - nonzero, SIZE),
    }
    weight[places[at]] = values
    return weight


@functools.cache
def _library() -> Any:
    module = tvm.IRModule({"unpack": unpacker(SIZE).with_attr("global_symbol", "unpack")})
    return tvm.compile(module, target=ISAS[resolve("native").isa].target())


@pytest.mark.parametrize(
    ("nonzero", "at"), [(0, "random"), (1, "last"), (9, "first"), (500, "random"), (1000, "last")]
)
def test_unpacked_is_what_was_packed(nonzero: int, at: str) -> None:
    weight = _weight(nonzero, at)
    packed = pack(weight)
    assert packed.size == SIZE // 8 + nonzero + 1
    assert is_worth(weight)
    result = tvm.runtime.tensor(np.full(SIZE, 77, np.int8))
    _library()["unpack"](tvm.runtime.tensor(packed), result)
    assert (result.numpy() == weight).all()


def test_what_stays_as_it_is() -> None:
    dense = _weight(SIZE // 2)
    assert pack(dense).size > 0.6 * SIZE
    assert not is_worth(dense)
    few = _weight(10)
    assert not is_worth(few[:1024])  # too small
    assert not is_worth(few[:-1])  # no whole bytes of bits
    assert not is_worth(few.reshape(64, 64))


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(256, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.wide(x)))  # type: ignore[no-any-return]


@functools.cache
def _artifact(sparsity: float) -> tuple[go.Artifact, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 256)
    program = go.capture(_Layers().eval(), (x,))
    if sparsity:
        program = go.passes.Prune(schedule=PerLayer(sparsity), layers=("wide",))(program)
    program = go.passes.Quantize(calibration=[(x,)])(program)
    return go.compile(program, threads=1), x


def test_a_linear_layer_pruned_by_elements() -> None:
    artifact, x = _artifact(0.9)
    (transform,) = artifact.manifest.weight_transforms
    whole = 256 * 128
    assert transform.result.shape == (whole,)
    assert artifact.weights[transform.weight].nbytes <= whole * (1 / 8 + 0.1) + 2
    with torch.no_grad():
        assert np.array_equal(artifact.session()(x.numpy()), artifact.program(x).numpy())
    dense, _ = _artifact(0.0)
    assert dense.manifest.weight_transforms == ()
    names = [[kernel.name for kernel in a.manifest.kernels] for a in (artifact, dense)]
    assert names[0] == names[1]  # the kernels are those of dense weights
