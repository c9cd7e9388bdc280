"""Concatenations in place: no kernel where the inputs can be written where they belong, and the same bits either way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from tests.end_to_end.support import RUNNABLE, assert_bit_equal, quantized, reference, run


class Fire(nn.Module):
    """SqueezeNet's block, one branch of which is read beside the concatenation, through a window."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 12, 1)
        self.left = nn.Conv2d(12, 20, 1)
        self.right = nn.Conv2d(12, 24, 3, padding=1)
        self.again = nn.Conv2d(24, 16, 3, padding=1)
        self.after = nn.Conv2d(44, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        left, right = self.left(x).relu(), self.right(x).relu()
        y: Tensor = self.after(torch.cat([left, right], 1)).relu() + self.again(right).relu()
        return y


class Dense(nn.Module):
    """DenseNet's block: every concatenation is the beginning of the next."""

    def __init__(self, growth: int) -> None:
        super().__init__()
        widths = [8 + growth * index for index in range(4)]
        self.layers = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths)
        self.first = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x).relu()]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)).relu())
        return torch.cat(maps, 1).mean((2, 3))


class Branches(nn.Module):
    """Inputs from every kind of kernel; the input of the network and a map that stands twice must be copied."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.after = nn.Conv2d(40 if copied else 24, 8, 1)
        self.copied = copied

    def forward(self, x: Tensor) -> Tensor:
        a = self.depthwise(x).relu()
        b = nn.functional.max_pool2d(a, 3, 1, 1)
        c = self.pointwise(a) + b
        parts = [a, x, b, c, a] if self.copied else [b, c, nn.functional.avg_pool2d(a, 3, 1, 1)]
        y: Tensor = self.after(torch.cat(parts, 1))
        return y


def concatenations(artifact) -> int:
    return sum(row.name.startswith("concat") for row in artifact.manifest.kernels)


NETWORKS = {
    "fire": (Fire, 0),
    "dense": (lambda: Dense(12), 0),
    "ragged": (lambda: Dense(6), None),
    "branches": (lambda: Branches(False), 0),
    "copied": (lambda: Branches(True), 1),
}


CASES = [*((name, "native") for name in NETWORKS), *(("fire", target) for target in RUNNABLE[1:])]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_bytes_are_equal_bit_for_bit(name, target):
    make, copies = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 11)
    artifact = go.compile(quantized(make().eval(), (x,)), target=target, threads=1)
    assert_bit_equal(run(artifact, (x,)), reference(artifact.program, (x,)))
    if copies is not None:
        assert concatenations(artifact) == copies


@pytest.mark.parametrize("name", ["dense", "branches", "copied"])
def test_floats_with_a_dynamic_batch_and_threads(name):
    make, copies = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(3, 8, 9, 11)
    program = go.capture(make().eval(), (x,), dynamic_batch=(1, 4))
    artifact = go.compile(program, threads=2)
    for batch in (x, x[:1]):
        want = reference(program, (batch,))
        # Sums of up to 400 products of about 1 in float32, in another order.
        torch.testing.assert_close(
            torch.from_numpy(run(artifact, (batch,))[0]),
            torch.from_numpy(want[0]),
            rtol=1e-4,
            atol=1e-5,
        )
    assert concatenations(artifact) == copies
