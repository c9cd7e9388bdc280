"""``W * M -> W'``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import graphopt as go
from graphopt.passes.prune import ApplyMasks, Block, PerLayer, Prune
from tests.passes.helpers import captured, operators, reasons, rewrites
from tests.passes.prune.support import capture, effective, masks, seeded, small_cnn


def pruned():
    return Prune(schedule=PerLayer(0.75), granularity=Block())(capture(small_cnn(), 2, 3, 8, 8))


def test_the_zeros_are_in_the_parameters():
    program = pruned()
    assert len(masks(program)) == 2
    flat = ApplyMasks()(program)
    assert rewrites(flat) == 4  # two parameters, two products
    assert masks(flat) == {}
    assert "mul" not in operators(flat)
    names = dict(flat.graph_module.named_parameters())
    assert set(names) == {name for name, _ in program.graph_module.named_parameters()}
    for name, weight in effective(program).items():
        assert torch.equal(names[name].detach(), weight)
        assert names[name].requires_grad
    assert flat.stats().to_json()["nonzero"] == program.stats().to_json()["nonzero"]
    assert flat.stats().parameters == program.stats().parameters


def test_a_second_run_rewrites_nothing():
    assert rewrites(ApplyMasks()(ApplyMasks()(pruned()))) == 0


def test_fold_constants_does_the_same_for_deployment():
    program = pruned()
    x = torch.randn(2, 3, 8, 8)
    folded = go.passes.FoldConstants(trainable=True)(program)
    assert "mul" not in operators(folded)
    assert torch.equal(folded(x), program(x))
    assert rewrites(go.passes.FoldConstants()(program)) == 0  # training goes on


def test_a_weight_read_by_two_layers():
    layer = seeded(lambda: nn.Linear(8, 8))
    program = captured(lambda x, a: a(torch.relu(a(x))), torch.randn(2, 8), a=layer)
    flat = ApplyMasks()(Prune(schedule=PerLayer(0.5))(program))
    assert "mul" not in operators(flat)
    assert rewrites(flat) == 2


def test_declines_a_weight_that_is_also_read_unmasked():
    def body(x, a, weight_mask):
        return nn.functional.linear(x, a.weight * weight_mask) + a.weight.sum()

    program = captured(body, torch.randn(2, 8), a=nn.Linear(8, 8), weight_mask=torch.ones(8, 8))
    flat = ApplyMasks()(program)
    assert rewrites(flat) == 0
    assert reasons(flat) == ["parameter a.weight is also read without this mask"]


def test_masks_of_torch_are_masks():
    model = small_cnn()
    convolution = model.get_submodule("3")
    l1_unstructured(convolution, "weight", amount=0.5)
    program = go.passes.RemoveIdentities()(capture(model, 2, 3, 8, 8))  # a cast of the mask
    assert list(masks(program)) == ["3.weight_orig"]
    more = Prune(schedule=PerLayer(0.8))(program)
    assert operators(more).count("mul") == 3
    assert "mul" not in operators(ApplyMasks()(more))
