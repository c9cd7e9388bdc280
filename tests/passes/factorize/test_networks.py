"""Whole networks: where each factorization applies, why it declines elsewhere, and that compiled code agrees."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from tests import zoo
from tests.end_to_end.support import assert_bit_equal, compiled, reference, run
from tests.models import example
from tests.passes.factorize.layers import CONVOLUTIONS, PASSES, planted
from tests.passes.helpers import reasons

# the convolutions that are neither 1 x 1 nor grouped, and the 1 x 1 and linear layers
LAYERS = {
    ("torchvision", "resnet18"): (17, 4),
    ("torchvision", "mobilenet_v2"): (1, 35),
    ("timm", "tf_efficientnet_lite0"): (1, 33),
}


@functools.cache
def network(library: str, name: str) -> go.Program:
    return go.passes.FoldBatchNorm()(go.capture(*zoo.build(library, name)))


def check(library: str, name: str, pass_name: str) -> None:
    program = network(library, name)
    factored = PASSES[pass_name](rank=1)(program)
    record = factored.history[-1]
    spatial, pointwise = LAYERS[library, name]
    applicable = pointwise if pass_name == "low-rank-linear" else spatial
    assert len(record.layers) == record.rewrites == applicable
    assert record.macs[1] < record.macs[0]
    for reason in Counter(reasons(factored)):
        assert "kernel" in reason or "groups" in reason, reason
    if pass_name == "low-rank-linear":
        budget = PASSES[pass_name](rank={"parameters": 0.8})(program).history[-1]
        if name == "resnet18":  # a twentieth of its parameters are in such layers
            start = "0.8 of the network's parameters cannot be reached: the layers that can be "
            assert sum(reason.startswith(start) for _, reason in budget.declines) == applicable
            assert not budget.rewrites
        else:
            assert budget.parameters[1] <= 0.8 * budget.parameters[0]
            assert budget.layers


@pytest.mark.parametrize("pass_name", PASSES)
def test_mobilenet(pass_name: str) -> None:
    if pass_name == "low-rank-linear":
        check("torchvision", "mobilenet_v2", pass_name)
        return
    record = PASSES[pass_name](rank=1)(network("torchvision", "mobilenet_v2")).history[-1]
    (change,) = record.layers
    assert change.parameters[0] == 32 * 3 * 9  # the first layer: all others are depthwise or 1 x 1


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(("library", "name"), LAYERS)
def test_architectures(library: str, name: str, pass_name: str) -> None:
    check(library, name, pass_name)


class Small(nn.Module):
    """One convolution for each factorization, a pointwise one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = [{"stride": 2, "padding": 1}, {"padding": 0}, *[{"padding": 1}] * 3]
        for name, geometry in zip(CONVOLUTIONS, options, strict=True):
            self.add_module(name, planted(24, 24, (3, 3), 1, **geometry))
        self.add_module("low-rank-linear", nn.Conv2d(24, 32, 1))
        self.head = nn.Linear(32, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in (*CONVOLUTIONS, "low-rank-linear"):
            x = torch.relu(self.get_submodule(name)(x))
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


@functools.cache
def small() -> go.Program:
    program = go.capture(Small().eval(), (example(1, 24, 14, 14),))
    for name, cls in PASSES.items():
        program = cls(rank=1, layers=(name,))(program)
        assert len(program.history[-1].layers) == 1
    return program


@pytest.mark.slow
def test_compiled_floats() -> None:
    program = small()
    x = program.example_inputs
    (got,), (expected,) = run(compiled(program), x), reference(program, x)
    # a dozen layers in float32, each with its sums in another order
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_compiled_integers() -> None:
    program = small()
    x = program.example_inputs
    artifact = compiled(go.passes.Quantize(calibration=[x])(program))
    assert_bit_equal(run(artifact, x), reference(artifact.program, x))
