"""Channels go by any score and schedule, down to a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import PassError
from graphopt.passes.prune import (
    BatchNormScale,
    Channel,
    Filter,
    Global,
    Gradual,
    Magnitude,
    PerLayer,
    Prune,
    Random,
    Sensitivity,
    Taylor,
    Threshold,
)
from tests.passes.helpers import network, operators, reasons
from tests.passes.prune.support import capture, granules_of, masks, scores_of, seeded, small_cnn


def chain():
    """Two convolutions of 4 and 6 channels and a linear layer, no norms."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 4, 5),
        )
    )


def widths(program):
    """Output channels of the layers in order."""
    layers = [n for n in program.graph.nodes if ops.is_op(n, "conv2d", "linear")]
    return [int(ops.bind(n)["weight"].meta["val"].shape[0]) for n in layers]


def test_the_score_of_a_channel_is_a_mean_over_its_rows_and_columns():
    program = capture(chain(), 2, 3, 4, 4)
    first, second = scores_of(Magnitude(1), program, Channel())
    a, b, c = (
        program.graph_module.get_parameter(name).detach().abs()
        for name in ("0.weight", "2.weight", "5.weight")
    )
    expected = (a.flatten(1).sum(1) + b.transpose(0, 1).flatten(1).sum(1)) / (3 + 6 * 9)
    torch.testing.assert_close(first, expected)
    expected = (b.flatten(1).sum(1) + c.reshape(5, 6, 4).sum((0, 2))) / (4 * 9 + 5 * 4)
    torch.testing.assert_close(second, expected)
    sizes = [one.sizes for one in granules_of(program, Channel())]
    assert sizes == [3 + 54, 36 + 20]


def test_the_taylor_score_of_a_channel_is_that_of_all_its_weights():
    program = capture(chain(), 2, 3, 4, 4)
    x, labels = program.example_inputs[0], torch.tensor([1, 3])
    first, _ = scores_of(Taylor(), program, Channel(), data=[(x, labels)])
    program.graph_module.zero_grad()
    nn.functional.cross_entropy(program(x), labels).backward()
    a, b = (program.graph_module.get_parameter(n) for n in ("0.weight", "2.weight"))
    assert a.grad is not None
    assert b.grad is not None
    rows, columns = (a * a.grad).flatten(1).sum(1), (b * b.grad).transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(first, ((rows + columns) / 57).abs().detach())


def test_batch_norm_scales_are_those_of_the_layer_that_makes_the_channel():
    model = small_cnn()
    model.get_parameter("1.weight").data.copy_(torch.arange(16.0))
    program = capture(model, 1, 3, 8, 8)
    first, _ = scores_of(BatchNormScale(), program, Channel())
    torch.testing.assert_close(first, torch.arange(16.0))


def test_the_network_shrinks_and_computes_what_it_did_without_the_channels():
    model = chain().eval()
    program = capture(model, 2, 3, 4, 4)
    shrunk = Prune(Random(1), PerLayer(0.5), Channel(of="channels"))(program)
    assert widths(shrunk) == [2, 3, 5]
    assert operators(shrunk) == operators(program)
    assert masks(shrunk) == {}
    assert reasons(shrunk) == ["its channels are an output of the network"]
    # a channel without its row and bias is a channel of zeros, relu(0) = 0
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        left = shrunk.graph_module.get_parameter(f"{name}.bias").detach()
        gone = [i for i, b in enumerate(layer.bias.detach()) if b not in left]
        layer.weight.data[gone] = 0
        layer.bias.data[gone] = 0
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(shrunk(x), model(x))


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize(
    "schedule", [Global(0.4), PerLayer(0.4), Sensitivity(0.4, levels=(0.3, 0.9))]
)
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "shufflenet", "transformer"])
def test_budgets_are_met_and_hardly_exceeded(name, schedule, of):
    program = network(name)
    prune = Prune(
        schedule=schedule, granularity=Channel(of), calibration=[program.example_inputs[0]]
    )
    shrunk = prune(program)
    before, after = program.stats(), shrunk.stats()
    removed = 1 - getattr(after, of) / getattr(before, of)
    assert removed >= 0.4 - 1e-6
    # a channel of these small networks holds up to a tenth of one layer, and several go at one share
    assert removed < 0.7


def test_counts_are_multiples_where_that_is_asked():
    program = capture(small_cnn(), 1, 3, 8, 8)
    shrunk = Prune(Random(), PerLayer(0.4), Channel(of="channels", multiple=8))(program)
    assert widths(shrunk) == [8, 8, 10]


def test_layers_tied_to_one_that_is_left_out_decline():
    program = network("resnet")
    pruned = Prune(granularity=Channel(), exclude=("body.0.conv2",))(program)
    assert "its channels are tied to those of conv2d_2" in reasons(pruned)


def test_the_history_tells_the_new_shapes():
    program = Prune(Random(1), PerLayer(0.5), Channel(of="channels"))(capture(chain(), 2, 3, 4, 4))
    layers = program.history[-1].layers
    assert [layer.text for layer in layers] == [
        "weight 2 x 3 x 1 x 1",
        "weight 3 x 2 x 3 x 3",
        "weight 5 x 12",
    ]
    assert layers[1].parameters == (216, 54)
    assert layers[1].macs == (2 * 4 * 216, 2 * 4 * 54)
    assert program.history[-1].notes == ("5 of 10 free channels in 2 groups are removed",)


def test_a_threshold_that_nothing_is_below_rewrites_nothing():
    program = Prune(schedule=Threshold(0.0), granularity=Channel())(network("resnet"))
    assert program.history[-1].rewrites == 0


def test_a_program_without_channels_comes_back_unchanged():
    program = Prune(granularity=Channel())(capture(nn.Linear(4, 4), 2, 4))
    assert program.history[-1].rewrites == 0
    assert program.history[-1].notes == ("no layer to prune",)
    assert reasons(program) == ["its channels are an output of the network"]


def test_masked_weights_shrink_with_their_masks():
    program = Prune(schedule=PerLayer(0.5))(capture(small_cnn(), 1, 3, 8, 8))
    shrunk = Prune(Random(1), PerLayer(0.5), Channel(of="channels"))(program)
    assert widths(shrunk) == [8, 8, 10]
    assert all(
        mask.shape == shrunk.graph_module.get_parameter(name).shape
        for name, mask in masks(shrunk).items()
    )


def test_shrunk_networks_compile_and_quantize():
    program = Prune(granularity=Channel(multiple=4))(capture(small_cnn(), 1, 3, 8, 8))
    x = program.example_inputs[0]
    quantized = go.passes.Quantize(calibration=[x])(program)
    artifact = go.compile(quantized, threads=1)
    assert artifact.program.stats().macs == program.stats().macs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Channel(of="flops"),  # type: ignore[arg-type]  # the mistake
            "granularity channel: of must be macs, parameters or channels, not 'flops'",
        ),
        (lambda: Channel(multiple=0), "granularity channel: multiple must be at least 1, not 0"),
        (
            lambda: Prune(schedule=Gradual(0.5), granularity=Channel()),
            "prune: schedule gradual moves masks, and granularity channel leaves none; prune channels in several "
            "runs with training between them",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(PassError) as caught:
        make()
    assert str(caught.value) == message


def uneven():
    """Two groups of four channels: the second's weights a hundred times as large, each with one weak channel."""
    first, second, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
    for layer, scale in ((first, 0.01), (second, 1.0), (last, 1.0)):
        nn.init.constant_(layer.weight, scale)
    with torch.no_grad():
        first.weight[1] *= 0.5
        second.weight[2] *= 0.5
        second.weight[:, 1] *= 0.5
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(4), last)


@pytest.mark.parametrize("granularity", [Filter(), Channel(of="channels")])
def test_magnitudes_of_channels_are_relative_to_their_layer(granularity):
    program = capture(uneven(), 1, 3, 4, 4)
    prune = Prune(Magnitude(), Global(0.26), granularity, exclude=("5",))
    result = prune(program)
    if isinstance(granularity, Channel):
        assert widths(result) == [3, 3, 2]
    else:
        rows = {name: mask.flatten(1).any(1).tolist() for name, mask in masks(result).items()}
        assert rows["0.weight"] == [True, False, True, True]
        assert rows["2.weight"] == [True, True, False, True]


def test_a_change_of_the_loss_is_divided_by_its_price():
    """The second layer works on a sixteenth of the positions, so that its weights cost a sixteenth."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    program = capture(layers, 1, 3, 4, 4)
    first, second = granules_of(program, Channel(of="macs"))
    # 3 + 4 weights a channel, the 3 used at 16 places; then 4 + 2, all used once
    assert first.price == pytest.approx((3 * 16 + 4) / 7)
    assert second.price == 1.0
    assert [one.price for one in granules_of(program, Channel(of="parameters"))] == [1.0, 1.0]
