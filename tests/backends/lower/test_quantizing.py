"""A quantize that alone reads a layer's float result is no kernel of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.lower import convolution, plan


class _Block(nn.Module):
    def __init__(self, activation: nn.Module, both: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 72), nn.Linear(72, 32)
        self.activation, self.both = activation, both

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.first(x))
        z: Tensor = self.second(y)
        return torch.cat([z, y], -1) if self.both else z


class _Maps(nn.Module):
    """A 1 x 1 layer before a depthwise one, which reads margins, and a 3 x 3 layer that is Winograd's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 40, 1)
        self.deep = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.square = nn.Conv2d(40, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 8, 1)
        self.activation = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.wide, self.deep, self.square):
            x = self.activation(layer(x))
        y: Tensor = self.last(x)
        return y


def _compile(model: nn.Module, x: Tensor) -> tuple[list[str], np.ndarray]:
    program = go.passes.Quantize(calibration=[x])(go.capture(model.eval(), (x,)))
    artifact = go.compile(program, threads=1)
    names = [kernel.name for kernel in artifact.manifest.kernels]
    return names, artifact.session(threads=1)(x.numpy())


def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan, "SELECTORS", (convolution.select_integer, *plan.SELECTORS[1:]), raising=True
    )
    monkeypatch.setattr(plan.make_plan, "__defaults__", (plan.SELECTORS, True))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardswish()], ids=str)
def test_one_kernel_with_the_bits_of_two(
    activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = _Block(activation), torch.randn(1, 21, 32)
    names, actual = _compile(model, x)
    _without(monkeypatch)
    others, expected = _compile(model, x)
    assert sum("quantize" in name for name in names) == 1, names
    assert sum("quantize" in name for name in others) == 2, others
    np.testing.assert_array_equal(actual, expected)


def test_a_result_that_others_read_stays_float() -> None:
    torch.manual_seed(0)
    names, _ = _compile(_Block(nn.GELU(), both=True), torch.randn(1, 21, 32))
    assert sum("quantize" in name for name in names) == 2, names


def test_maps_with_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = _Maps(), torch.randn(1, 16, 21, 19)
    names, actual = _compile(model, x)
    _without(monkeypatch)
    others, expected = _compile(model, x)
    assert len(names) == len(others) - 1, (names, others)
    np.testing.assert_array_equal(actual, expected)
