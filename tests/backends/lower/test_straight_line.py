"""The line that is recorded beside a compiled model: it is the code of the network, or says which operator it cannot hold."""

from __future__ import annotations

import json
import re

import numpy as np
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt import manifest as manifest_file
from tests.models import example


class Gather(nn.Module):
    """A table that is folded to a constant, a split of two results, an output that is an input and one that is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.conv(x).split(8, 1)
        return (a * b).sum(1)[:, torch.arange(8)].cumsum(1), x, self.conv.weight


class TopK(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(3)[0]


class MixesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x.sum(0, keepdim=True) + x, (16,))


class Named(nn.Module):
    """A parameter that has the name of the first constant, and a constant that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.constant_0 = nn.Parameter(torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) * torch.arange(8, dtype=torch.float32) + self.constant_0


class Bfloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16().cumsum(1).float()


class Bfloat16Table(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() + torch.arange(8, dtype=torch.bfloat16)).float()


def compiled(
    model: nn.Module, x: Tensor, dynamic_batch: tuple[int, int] | None = None
) -> go.Artifact:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return go.compile(go.capture(model.eval(), (x,), dynamic_batch=dynamic_batch), threads=1)


def test_calls_follow_each_other_from_the_inputs_to_the_outputs():
    artifact = compiled(Gather(), example(1, 16, 32, 32))
    line = artifact.manifest.line
    assert not line.refused
    places = [f"{tensor.memory} {tensor.index}" for tensor in line.tensors]
    ready = {place for place in places if place.startswith(("input", "weight"))}
    for call in line.calls:
        assert places[call.arguments[0]] in ready, call
        ready |= {places[n] for n in call.arguments}
    assert ready == set(places)
    assert [line.tensors[n].memory for n in line.outputs] == ["result", "input", "weight"]
    assert line.tensors[line.outputs[2]].shape == (16, 16, 3, 3)


def test_a_constant_is_a_weight_and_the_session_takes_it():
    artifact = compiled(Gather(), example(1, 16, 32, 32))
    line, x = artifact.manifest.line, example(1, 16, 32, 32)
    assert "constant_0" in artifact.weights
    assert list(artifact.weights).index("constant_0") in {
        line.tensors[n].index
        for call in line.calls
        for n in call.arguments
        if line.tensors[n].memory == "weight"
    }
    for mine, theirs in zip(artifact.session()(x.numpy()), artifact.program(x), strict=True):
        # sums of 64 products of float32 below 4, in another order
        np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-4, rtol=0)


def test_a_constant_takes_no_weights_name():
    x = torch.arange(16.0).reshape(2, 8)  # whole numbers: exact
    artifact = compiled(Named(), x)
    assert {"constant_0", "constant_1"} <= set(artifact.weights)
    assert (artifact.session()(x.numpy()) == Named()(x).detach().numpy()).all()


def test_an_element_type_that_numpy_lacks_is_refused_and_the_manifest_can_be_read():
    manifest = compiled(Bfloat16(), torch.ones(1, 4)).manifest
    assert manifest.line.refused.endswith("takes the element type bfloat16")
    body = json.loads(manifest.to_json({}))
    assert manifest_file.from_json(body).line == manifest.line


def test_a_constant_that_no_file_of_weights_holds_stays_in_the_code():
    x = torch.arange(8.0).reshape(1, 8)  # whole numbers below 2**8: exact in bfloat16
    artifact = compiled(Bfloat16Table(), x)
    assert not artifact.weights
    refused = artifact.manifest.line.refused
    assert re.fullmatch(r"operator '\w+' takes a constant of type .*bfloat16.*", refused), refused
    assert (artifact.session()(x.numpy()) == Bfloat16Table()(x).numpy()).all()


def test_the_workspace_is_that_of_the_greediest_kernel():
    winograd = compiled(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), example(1, 64, 32, 32))
    assert "winograd" in winograd.manifest.line.calls[1].function
    assert winograd.manifest.line.workspace > 1024
    plain = compiled(nn.Sequential(nn.Conv2d(64, 64, 1)), example(1, 64, 8, 8))
    assert plain.manifest.line.workspace == 0


def test_a_function_of_the_runtime_is_refused_by_the_operators_name():
    line = compiled(TopK(), example(1, 16)).manifest.line
    assert line.refused == "operator 'topk' calls tvm.contrib.sort.topk of TVM's runtime"


def test_a_dynamic_shape_is_refused_by_the_operators_name():
    line = compiled(MixesTheBatch(), example(2, 16), dynamic_batch=(1, 8)).manifest.line
    assert line.refused.startswith("operator 'sum' takes the dynamic shape [")
    assert line.refused.endswith(", 16]")
