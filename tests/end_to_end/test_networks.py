"""Whole networks at int8: the compiled file gives the bits of the integer program, on every row this CPU runs."""

from __future__ import annotations

import pytest
import torch

from graphopt.demo import network
from graphopt.torchvision_import import torchvision_models
from tests.end_to_end.support import (
    RUNNABLE,
    assert_bit_equal,
    compiled,
    float_islands,
    quantized,
    reference,
    run,
)
from tests.models import example, randomize

NETWORKS = ("resnet18", "mobilenet_v2", "squeezenet1_1", "efficientnet_lite0")


def _network(name: str) -> torch.nn.Module:
    if name == "efficientnet_lite0":
        return network.load()
    torch.manual_seed(0)
    return randomize(torchvision_models().get_model(name, weights=None))


QUICK = [(name, RUNNABLE[0]) for name in NETWORKS]
QUICK += [("mobilenet_v2", target) for target in RUNNABLE[1:]]


@pytest.mark.parametrize(("name", "target"), QUICK)
def test_int8_bits(name: str, target: str) -> None:
    """One small image; every row on the network with the most kinds of kernel."""
    _check(name, target, 64)


@pytest.mark.slow
@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("name", NETWORKS)
def test_int8_bits_full_size(name: str, target: str) -> None:
    _check(name, target, 224)


def _check(name: str, target: str, side: int) -> None:
    inputs = (example(1, 3, side, side),)
    artifact = compiled(quantized(_network(name), inputs), target)
    assert not float_islands(artifact.program)
    assert_bit_equal(run(artifact, inputs), reference(artifact.program, inputs))


@pytest.mark.parametrize("threads", [2])
def test_threads_do_not_change_bits(threads: int) -> None:
    inputs = (example(2, 3, 64, 64),)
    artifact = compiled(quantized(_network("mobilenet_v2"), inputs), threads=threads)
    assert_bit_equal(run(artifact, inputs), reference(artifact.program, inputs))
