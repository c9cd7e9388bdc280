"""Masks on the way to a file: batch norms folded, ranges equalized, weights quantized; zeros stay zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.passes.prune import NM, Block, Element, Filter, Global, PerLayer, Prune
from tests.passes.helpers import network, operators
from tests.passes.prune.support import capture, effective, masks, seeded, small_cnn

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def pruned(granularity=None):
    return Prune(schedule=PerLayer(), granularity=granularity or Block())(
        capture(small_cnn(), 2, 3, 8, 8)
    )


def zeros(tensors):
    return {name: tensor == 0 for name, tensor in tensors.items()}


def same_zeros(program, result):
    """What is pruned is pruned after ``result``'s passes, by the weights' names."""
    before, after = zeros(effective(program)), zeros(effective(result))
    return all(torch.equal(before[name], after[name]) for name in after) and set(after) == set(
        before
    )


def test_batch_norms_fold_around_masks():
    program = pruned()
    folded = go.passes.FoldBatchNorm()(program)
    assert "batch_norm" not in operators(folded)
    assert list(masks(folded)) == list(masks(program))
    assert same_zeros(program, folded)


def test_a_batch_norm_before_a_masked_layer():
    layers = seeded(lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    layers.get_buffer("0.running_mean").copy_(torch.randn(8))
    program = Prune(schedule=PerLayer(0.5))(capture(layers, 2, 8, 4, 4))
    folded = go.passes.FoldBatchNorm()(program)
    assert operators(folded) == ["mul", "conv2d"]
    assert same_zeros(program, folded)


def test_ranges_are_equalized_under_masks():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    for layer in (0, 2, 4):
        nn.init.normal_(
            model.get_parameter(f"{layer}.weight"), generator=torch.Generator().manual_seed(layer)
        )
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(10 ** torch.linspace(-1, 1, 8).reshape(8, 1, 1, 1))
    program = Prune(schedule=PerLayer(0.5))(capture(model, 2, 3, 8, 8))
    equal = go.passes.EqualizeWeights()(program)
    assert equal.history[-1].rewrites == 5
    assert equal.history[-1].declines == ()
    assert same_zeros(program, equal)
    weights = effective(equal)
    rows = weights["0.weight"].abs().flatten(1).amax(1)
    columns = weights["2.weight"].abs().amax((1, 2, 3))
    both = (rows > 0) & (columns > 0)
    # every scale within 2 % of 1, of the weights that are left
    torch.testing.assert_close(rows[both], columns[both], rtol=0.05, atol=0)


@pytest.mark.parametrize("granularity", [Element(), Block(), NM(), Filter()])
def test_zeros_are_zeros_in_int8(granularity):
    program = pruned(granularity)
    quantized = go.passes.Quantize(calibration=[X])(program)
    integer = go.integerize(quantized)
    assert integer.history[-1].declines == ()
    found = 0
    for name, mask in masks(program).items():
        stored = [
            tensor
            for path, tensor in integer.graph_module.state_dict().items()
            if tensor.dtype == torch.int8
            and tensor.shape == mask.shape
            and path.startswith(name.split(".")[0] + ".")
        ]
        (weight,) = stored
        assert bool((weight[mask == 0] == 0).all())
        assert bool((weight[mask == 1] != 0).any())
        found += 1
    assert found == len(masks(program)) > 0


def test_fake_quantization_stands_behind_the_mask_in_either_order():
    first = go.passes.Quantize(calibration=[X])(pruned())
    second = Prune(schedule=PerLayer(), granularity=Block())(
        go.passes.Quantize(calibration=[X])(capture(small_cnn(), 2, 3, 8, 8))
    )
    for program in (first, second):
        for node in program.graph.nodes:
            if ops.masked(node) is not None:
                (user,) = node.users
                assert "fake_quantize" in str(user.target)
        assert len(masks(program)) == 2


def test_a_quantized_masked_network_trains():
    program = go.passes.Quantize(calibration=[X])(pruned()).copy().train()
    gone = zeros(effective(program))
    optimizer = torch.optim.SGD(program.graph_module.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(program(X), torch.tensor([1, 2])).backward()
        optimizer.step()
    after = effective(program)
    assert all(bool((after[name][mask] == 0).all()) for name, mask in gone.items())


@pytest.mark.parametrize("quantize", [False, True])
def test_a_masked_network_compiles_as_one_with_those_weights(quantize, tmp_path):
    """Bit for bit: to the compiler a mask is a part of the weight."""
    program = Prune(schedule=Global(0.7), granularity=Block())(network("mobilenet"))
    x = program.example_inputs[0]
    if quantize:
        program = go.passes.Quantize(calibration=[x])(program)
    outputs, kernels = [], []
    for name, source in (("masked", program), ("plain", go.passes.ApplyMasks()(program))):
        artifact = go.compile(source, threads=1)
        artifact.save(tmp_path / f"{name}.gopt")
        outputs.append(go.load(tmp_path / f"{name}.gopt")(x.numpy()))
        kernels.append([kernel.name for kernel in artifact.manifest.kernels])
    assert kernels[0] == kernels[1]
    assert np.array_equal(outputs[0], outputs[1])
