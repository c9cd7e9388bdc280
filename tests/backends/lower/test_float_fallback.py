"""Layers that stay float because their integer form is slower: decided, reported, and in ``artifact.program``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.integerize import integerize, kept_in_float
from graphopt.backends.lower.float_fallback import Times, faster_in_float, integer_layers
from graphopt.backends.x86.isa import ISAS

ISA = ISAS["avx2"]


def _quantized(net: nn.Module, *shape: int) -> tuple[go.Program, torch.Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    program = go.capture(net.eval(), (x,))
    return go.passes.Quantize(calibration=[x])(program), x


@pytest.fixture(scope="module")
def lenet() -> tuple[go.Program, torch.Tensor]:
    """The convolutions of LeNet-5; the first one is faster in float on AVX2 and SSE4."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    return _quantized(nn.Sequential(*first, nn.Conv2d(6, 16, 5)), 1, 1, 28, 28)


def test_every_integer_layer_is_found_by_its_float_name(
    lenet: tuple[go.Program, torch.Tensor],
) -> None:
    program, _ = lenet
    layers = integer_layers(integerize(program))
    assert list(layers) == ["conv2d", "conv2d_1"]
    assert [layer.int8.y.channels for layer in layers.values()] == [6, 16]


def test_linear_layers_of_three_dimensions_are_found() -> None:
    program, _ = _quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 2, 5, 6)
    layers = list(integer_layers(integerize(program)).values())
    assert [(layer.int8.x.width, layer.int8.x.channel_stride) for layer in layers] == [(5, 8)] * 2


def test_a_measured_time_decides(lenet: tuple[go.Program, torch.Tensor]) -> None:
    """Half a microsecond is added for each further kernel, and 5 % are not enough."""
    layers = integer_layers(integerize(lenet[0]))
    first, second = (layer.key for layer in layers.values())
    measured = {first: Times(10e-6, 8.6e-6), second: Times(12.3e-6, 9.3e-6)}
    reasons = faster_in_float(layers, ISA, 1, measured)
    assert reasons == {"conv2d_1": "int8 12.3 us, float 9.8 us with conversions (measured)"}


def test_an_estimate_needs_a_larger_lead(lenet: tuple[go.Program, torch.Tensor]) -> None:
    layers = integer_layers(integerize(lenet[0]))
    (reason,) = faster_in_float(layers, ISA, 1, {}).values()
    assert reason.endswith("thousand cycles with conversions (estimated)")
    assert faster_in_float(layers, ISAS["avx512-vnni"], 1, {}) == {}


def test_depthwise_layers_stay_integer_until_measured() -> None:
    program, _ = _quantized(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()), 1, 8, 12, 12)
    layers = integer_layers(integerize(program))
    assert faster_in_float(layers, ISA, 1, {}) == {}
    measured = {layers["conv2d"].key: Times(30e-6, 20e-6)}
    assert list(faster_in_float(layers, ISA, 1, measured)) == ["conv2d"]


@pytest.mark.parametrize("target", ["avx2", "x86-64"])
def test_the_compiled_program_has_the_layer_in_float(
    lenet: tuple[go.Program, torch.Tensor], target: str
) -> None:
    program, x = lenet
    artifact = go.compile(program, target, threads=1)
    ((layer, reason),) = artifact.report.float_layers
    assert layer == "conv2d"
    assert reason.endswith("(estimated)")
    assert artifact.manifest.report["float_layers"] == [{"node": layer, "reason": reason}]
    assert kept_in_float(artifact.program) == artifact.report.float_layers
    kinds = [k.dtype for k in artifact.manifest.kernels if k.name.startswith("conv2d")]
    assert kinds == ["float32", "int8"]
    if not go.backends.targets.resolve(target).runs_here():
        pytest.skip(f"this CPU does not run {target}")
    with torch.no_grad():
        expected = artifact.program(x).numpy()
    # Some of conv2d's 4,704 sums may round to the other step: 0.4 % of its range, and so of the result's.
    error = np.abs(artifact.session()(x.numpy()) - expected).max()
    assert error < 0.01 * np.abs(expected).max()


def test_reasons_name_nodes_exactly(lenet: tuple[go.Program, torch.Tensor]) -> None:
    """Names in a node's provenance do not count: another node may have them by now."""
    program = go.passes.FoldBatchNorm()(go.passes.RemoveIdentities()(lenet[0]))
    kept = integerize(program, {"conv2d_1": "a test says so"})
    assert dict(kept_in_float(kept))["conv2d_1"] == "a test says so"
    assert kept_in_float(integerize(program, {"absent": "a test says so"})) == ()
