"""``|gamma|`` of the batch norm that follows."""

import torch
from torch import nn

import graphopt as go
from graphopt.passes.prune import BatchNormScale, Filter, PerLayer, Prune
from tests.passes.helpers import reasons
from tests.passes.prune.support import capture, masks, scores_of, small_cnn


def network():
    model = small_cnn()
    model.get_parameter("1.weight").data.copy_(torch.linspace(-1, 1, 16))
    model.get_parameter("4.weight").data.copy_(torch.arange(16.0))
    return model


def test_filters_are_worth_their_scale():
    program = capture(nn.Sequential(*network()[:6]), 1, 3, 8, 8)
    first, second = scores_of(BatchNormScale(), program, Filter())
    torch.testing.assert_close(first.flatten(), torch.linspace(-1, 1, 16).abs())
    torch.testing.assert_close(second.flatten(), torch.arange(16.0))


def test_transposed_grouped_convolutions():
    norm = nn.BatchNorm2d(6)
    norm.weight.data.copy_(torch.arange(6.0))
    layers = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), norm)
    (scores,) = scores_of(BatchNormScale(), capture(layers, 1, 4, 3, 3), Filter())
    torch.testing.assert_close(scores.flatten(), torch.arange(6.0))


def test_the_least_scales_go_and_others_decline():
    prune = Prune(BatchNormScale(), PerLayer(0.25), Filter())
    program = prune(capture(network(), 1, 3, 8, 8))
    assert reasons(program) == ["no batch norm with a scale follows it"]
    kept = masks(program)["3.weight"].flatten(1).any(1)
    assert kept.tolist() == [False] * 4 + [True] * 12


def test_declines_once_batch_norms_are_folded():
    folded = go.passes.FoldBatchNorm()(capture(network(), 1, 3, 8, 8))
    program = Prune(BatchNormScale())(folded)
    assert program.history[-1].rewrites == 0
    assert reasons(program) == ["no batch norm with a scale follows it"] * 3
