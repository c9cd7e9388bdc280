"""Whole networks for ARM: the kernels of the compiled library, emulated, give the bits of the integer program."""

from __future__ import annotations

import pytest
import torch

from graphopt.demo import network
from graphopt.torchvision_import import torchvision_models
from tests.backends.arm.machine import needs_qemu
from tests.backends.arm.network import run
from tests.end_to_end.support import (
    assert_bit_equal,
    compiled,
    float_islands,
    quantized,
    reference,
)
from tests.models import MODELS, example, randomize
from tests.random_graphs import random_model

pytestmark = needs_qemu

TARGETS = ("aarch64", "raspberry-pi-4", "raspberry-pi-5", "graviton3")
NETWORKS = ("efficientnet_lite0", "mobilenet_v2", "resnet18")
SEEDS = 100


def _check(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], target: str) -> None:
    artifact = compiled(quantized(model, inputs), target)
    got, want = run(artifact, inputs), reference(artifact.program, inputs)
    if not float_islands(artifact.program):
        assert_bit_equal(got, want)
        return
    for ours, defined in zip(got, want, strict=True):
        scale = max(1e-3, float(abs(defined).max()))
        # float islands have their own rounding, which may tip a later quantize
        assert float(abs(ours - defined).max()) <= 0.1 * scale


@pytest.mark.parametrize(
    ("name", "target"),
    [("mobilenet", "raspberry-pi-5"), ("resnet", "raspberry-pi-4"), ("squeezenet", "graviton3")],
)
def test_small_networks(name: str, target: str) -> None:
    _check(*MODELS[name](), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str, target: str) -> None:
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        model = network.load()
    else:
        model = randomize(torchvision_models().get_model(name, weights=None))
    _check(model, (example(1, 3, 224, 224),), target)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_networks(seed: int) -> None:
    model, x = random_model(seed)
    _check(model, (x,), TARGETS[seed % len(TARGETS)])
