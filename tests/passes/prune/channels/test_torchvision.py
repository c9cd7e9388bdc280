"""The couplings of torchvision's classification networks: quick to find, most layers free, masked and shrunk alike."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.contract import difference
from graphopt.passes.prune import channels
from graphopt.torchvision_import import torchvision_models
from tests import zoo
from tests.end_to_end.support import compiled, reference, run
from tests.models import MODELS, example, randomize
from tests.passes.prune.channels.helpers import Choice, masked, shrunk

# name -> layers with free channels, layers, per cent of all layers' output channels that are free. A last layer never
# is; transformers keep what their norms read, shufflenet what its shuffles join.
FREE = {
    "alexnet": (7, 8, 90),
    "convnext_tiny": (18, 59, 63),
    "densenet121": (120, 121, 91),
    "efficientnet_b0": (81, 82, 97),
    "googlenet": (57, 58, 88),
    "inception_v3": (94, 95, 95),
    "maxvit_t": (91, 151, 82),
    "mnasnet0_5": (52, 53, 91),
    "mobilenet_v2": (52, 53, 94),
    "mobilenet_v3_small": (53, 54, 91),
    "regnet_x_400mf": (71, 72, 95),
    "resnet18": (20, 21, 83),
    "resnet50": (53, 54, 96),
    "resnext50_32x4d": (53, 54, 97),
    "shufflenet_v2_x0_5": (51, 57, 73),
    "squeezenet1_1": (25, 26, 75),
    "swin_t": (24, 53, 73),
    "swin_v2_t": (48, 77, 77),
    "vgg11_bn": (10, 11, 92),
    "vit_b_32": (24, 50, 76),
}
QUICK = ("squeezenet1_1",)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name in zoo.TORCHVISION:
        return zoo.build("torchvision", name)
    side = {"maxvit_t": 224, "swin_v2_t": 64}[name]
    torch.manual_seed(0)
    model = torchvision_models().get_model(name, weights=None)
    return randomize(model), (example(1, 3, side, side),)


def half(coupling: channels.Coupling, multiple: int = 1) -> Choice:
    """About half of every group, by made-up scores."""
    generator = torch.Generator().manual_seed(0)
    return {
        number: group.best(
            torch.rand(group.size, generator=generator), group.count(group.size / 2, multiple)
        )
        for number, group in enumerate(coupling.groups)
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FREE]
)
def test_couplings_of(name: str) -> None:
    model, inputs = build(name)
    started = time.perf_counter()
    program = go.capture(model.double(), tuple(x.double() for x in inputs))
    captured = time.perf_counter()
    coupling = channels.couple(program)
    found = time.perf_counter()
    assert found - captured < captured - started  # a tenth of it when nothing else runs

    widths = {n: shape(n)[-1 if "linear" in str(n.target) else 1] for n in coupling.share}
    free = sum(share * widths[node] for node, share in coupling.share.items())
    layers = sum(share > 0 for share in coupling.share.values())
    assert (layers, len(widths), round(100 * free / sum(widths.values()))) == FREE[name]

    choice = half(coupling)
    zeroed, small = masked(program, choice), shrunk(program, choice)
    with torch.no_grad():
        error = difference(zeroed(*program.example_inputs), small(*program.example_inputs))
    # float64: 1e-16 a rounding, sums of some thousand terms of size 1, a hundred layers
    assert error <= 1e-10
    keep = {coupling.groups[number]: kept for number, kept in choice.items()}
    cost, stats = channels.CostModel(coupling)(keep), small.stats()
    assert (cost.parameters, cost.macs) == (stats.parameters, stats.macs)
    assert stats.macs < 0.6 * program.stats().macs


def shape(node: torch.fx.Node) -> torch.Size:
    value: Tensor = node.meta["val"]
    return value.shape


@pytest.mark.parametrize(
    "name",
    ["mobilenet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "mobilenet_v2"))],
)
def test_a_shrunk_network_compiles(name: str) -> None:
    """Counts are multiples of 16, which fill vectors; float32 code equals the program up to the order of sums."""
    model, inputs = MODELS[name]() if name in MODELS else build(name)
    coupling = channels.couple(go.capture(model, inputs))
    choice = half(coupling, multiple=16)
    wide = [n for n, group in enumerate(coupling.groups) if group.size >= 16]
    assert wide
    assert all(choice[n].numel() % 16 == 0 for n in wide)
    small = shrunk(coupling.program, choice)
    for ours, theirs in zip(run(compiled(small), inputs), reference(small, inputs), strict=True):
        # 6e-8 a rounding, sums of up to 4608 terms, twenty to fifty layers; folded batch norms round once more
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
