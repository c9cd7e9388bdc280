"""The pass: masks in the graph, who declines, what a second run does, history and recipes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt as go
from graphopt import ops
from graphopt.errors import PassError, RecipeError
from graphopt.passes.prune import (
    NM,
    Activation,
    Block,
    Element,
    Filter,
    Global,
    Gradual,
    Magnitude,
    Obd,
    PerLayer,
    Prune,
    Random,
    Taylor,
    Threshold,
)
from tests.passes.helpers import captured, operators, reasons, rewrites
from tests.passes.prune.support import (
    capture,
    effective,
    linear,
    masks,
    seeded,
    small_cnn,
    sparsity,
)


def cnn():
    return capture(small_cnn(), 2, 3, 8, 8)


def test_a_mask_stands_between_weight_and_layer():
    program = cnn()
    pruned = Prune(schedule=PerLayer(0.5))(program)
    assert operators(program).count("mul") == 0
    assert operators(pruned).count("mul") == 3
    assert rewrites(pruned) == 3
    conv = next(n for n in pruned.graph.nodes if ops.is_op(n, "conv2d"))
    pair = ops.masked(ops.bind(conv)["weight"])
    assert pair is not None
    weight, mask = pair
    assert (weight.target, mask.target) == ("0.weight", "0.weight_mask")
    assert pruned.tensor(weight) is program.tensor(weight)
    assert dict(pruned.graph_module.named_buffers())["0.weight_mask"].dtype == torch.float32
    assert conv.name not in {n.name for n in pruned.graph.nodes if "provenance" not in n.meta}


def test_the_smallest_weights_of_each_layer_are_gone():
    program = cnn()
    for name, weight in effective(Prune(schedule=PerLayer(0.3))(program)).items():
        before = program.graph_module.get_parameter(name).detach()
        order = before.abs().flatten().sort().values
        bound = order[round(0.3 * before.numel())]
        expected = torch.where(before.abs() >= bound, before, 0.0)
        assert torch.equal(weight, expected)


def test_the_network_computes_with_the_masked_weights():
    model = small_cnn().eval()
    pruned = Prune(schedule=Global(0.8))(capture(model, 2, 3, 8, 8))
    for name, weight in effective(pruned).items():
        model.get_parameter(name).data.copy_(weight)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    # the same weights in the same operators
    assert torch.equal(pruned(x), model(x))


def test_one_threshold_over_all_layers():
    program = Prune(schedule=Global(0.6, most=1.0))(cnn())
    weights = effective(program)
    kept = torch.cat([w[w != 0].abs() for w in weights.values()])
    gone = torch.cat(
        [
            program.graph_module.get_parameter(name).detach()[w == 0].abs()
            for name, w in weights.items()
        ]
    )
    assert gone.max() <= kept.min()
    assert gone.numel() == round(0.6 * (gone.numel() + kept.numel()))


def test_a_threshold_on_weights():
    program = capture(linear([[0.1, -0.2, 0.3, 0.4]]), 1, 4)
    pruned = Prune(schedule=Threshold(0.25))(program)
    assert effective(pruned)["weight"].tolist() == [
        [0.0, -0.0, pytest.approx(0.3), pytest.approx(0.4)]
    ]
    everything = Prune(schedule=Threshold(10.0))(program)
    assert effective(everything)["weight"].count_nonzero() == 1  # most: one is left


def test_layers_scaled_apart_compare_when_normalized():
    model = nn.Sequential(
        linear([[1.0, 2.0, 3.0, 4.0]] * 4), linear([[100.0, 200.0, 300.0, 400.0]] * 4)
    )
    program = capture(model, 1, 4)
    plain = effective(Prune(schedule=Global(0.5))(program))
    assert sparsity({"w": plain["0.weight"]}) > 0.9
    equal = effective(Prune(schedule=Global(0.5, normalize=True))(program))
    assert sparsity({"w": equal["0.weight"]}) == 0.5


def test_a_second_run_rewrites_nothing():
    for granularity in (Element(), Block(), NM(), Filter()):
        schedule = PerLayer()
        once = Prune(schedule=schedule, granularity=granularity)(cnn())
        twice = Prune(schedule=schedule, granularity=granularity)(once)
        assert rewrites(once) > 0
        assert rewrites(twice) == 0
        assert operators(twice) == operators(once)


def test_a_second_run_prunes_on_and_what_is_gone_stays_gone():
    once = Prune(Random(1), PerLayer(0.5))(cnn())
    twice = Prune(Random(2), PerLayer(0.8))(once)
    assert operators(twice).count("mul") == 3
    first, second = masks(once), masks(twice)
    assert sparsity(second) == pytest.approx(0.8, abs=1e-3)
    assert all(bool((second[name] <= first[name]).all()) for name in first)
    assert sparsity(masks(Prune(Random(3), PerLayer(0.2))(twice))) == sparsity(second)


def test_a_weight_may_come_back_where_that_is_allowed():
    once = Prune(Random(1), PerLayer(0.5))(cnn())
    again = Prune(Magnitude(), PerLayer(0.5), monotone=False)(once)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            effective(again).values(),
            effective(Prune(Magnitude(), PerLayer(0.5))(cnn())).values(),
            strict=True,
        )
    )


def test_one_mask_for_a_weight_that_two_layers_read():
    layer = seeded(lambda: nn.Linear(8, 8))
    program = captured(lambda x, a: a(torch.relu(a(x))), torch.randn(2, 8), a=layer)
    pruned = Prune(schedule=PerLayer(0.5))(program)
    assert operators(pruned).count("mul") == 1
    assert [change.node for change in pruned.history[-1].layers] == ["linear", "linear_1"]


def test_one_mask_for_a_tensor_under_two_names():
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    last.weight = first.weight
    pruned = Prune(schedule=PerLayer(0.5))(capture(nn.Sequential(first, nn.ReLU(), last), 2, 8))
    assert operators(pruned).count("mul") == 1
    x = torch.randn(2, 8)
    (weight,) = effective(pruned).values()
    expected = F.linear(F.linear(x, weight, first.bias).relu(), weight, last.bias)
    assert torch.equal(pruned(x), expected)


@pytest.mark.parametrize(
    ("function", "parts", "reason"),
    [
        (
            lambda x, a: F.linear(x, a.weight * 2.0, a.bias),
            {"a": nn.Linear(8, 8)},
            "its weight is computed",
        ),
        (
            lambda x, a: a(x) + a.weight.sum(),
            {"a": nn.Linear(8, 8)},
            "its weight is also read by sum_1",
        ),
        (
            lambda x, a: (
                F.conv1d(x[..., None], a.weight) + F.conv_transpose1d(x[..., None], a.weight)
            ),
            {"a": nn.Conv1d(8, 8, 1)},
            "its weight is shared by layers that read its axes differently",
        ),
        (
            lambda x, a: torch.relu(x),
            {"a": nn.Linear(8, 8)},
            None,
        ),
    ],
)
def test_declines(function, parts, reason):
    torch.manual_seed(0)
    pruned = Prune()(captured(function, torch.randn(2, 8), **parts))
    assert rewrites(pruned) == 0
    assert set(reasons(pruned)) == ({reason} if reason else set())
    assert pruned.history[-1].notes == ("no layer to prune",)
    assert pruned.history[-1].error == 0.0


def test_layers_are_chosen_by_name_operator_and_place():
    def pruned(**options):
        program = Prune(schedule=PerLayer(0.5), **options)(cnn())
        return list(masks(program)), program.history[-1].declines

    every = ["0.weight", "3.weight", "8.weight"]
    assert pruned()[0] == every
    left_out = "left out by the options layers and exclude"
    assert pruned(layers=("conv2d",)) == (every[:2], (("linear", left_out),))
    assert pruned(exclude=("3",)) == (["0.weight", "8.weight"], (("conv2d_1", left_out),))
    assert pruned(keep_first=True) == (every[1:], (("conv2d", "a first layer (keep_first)"),))
    assert pruned(keep_last=True) == (every[:2], (("linear", "a last layer (keep_last)"),))
    few = "it has 160 weights, fewer than min_weights=161"
    assert pruned(min_weights=161) == (every[:2], (("linear", few),))


def test_a_shared_weight_is_left_out_with_its_layer():
    layer = seeded(lambda: nn.Linear(8, 8))
    program = captured(lambda x, a: a(torch.relu(a(x))), torch.randn(2, 8), a=layer)
    pruned = Prune(keep_first=True)(program)
    assert pruned.history[-1].declines == (
        ("linear", "a first layer (keep_first)"),
        ("linear_1", "its weight is shared with linear, which is left out"),
    )


def test_the_history_tells_what_became_of_each_layer():
    program = Prune(schedule=PerLayer(0.75))(cnn())
    record = program.history[-1]
    first = record.layers[0]
    assert (first.node, first.layer) == ("conv2d", "0")
    assert first.parameters == (432, 108)
    assert first.macs == (2 * 432 * 64, 2 * 108 * 64)
    assert first.text == "75.0% zeros"
    weight = program.graph_module.get_parameter("0.weight").detach()
    masked = effective(program)["0.weight"]
    assert first.error == pytest.approx(float((weight - masked).norm() / weight.norm()))
    assert record.notes == ("75.0% of 2,896 weights in 3 tensors are masked",)
    assert record.options["schedule"] == {"per-layer": {"sparsity": 0.75}}
    assert record.parameters[0] == record.parameters[1]
    assert program.stats().nonzero < cnn().stats().nonzero - 2000


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_in_every_pattern(seed):
    from tests.random_graphs import random_model

    model, x = random_model(seed)
    program = go.capture(model, (x,))
    for granularity in (Element(), Block(), NM(), Filter()):
        pruned = Prune(Random(seed), PerLayer(), granularity)(program)
        zeros = masks(pruned)
        assert set(pruned.graph_module.state_dict()) - set(program.graph_module.state_dict()) == {
            f"{name}_mask" for name in zeros
        }
        assert bool(torch.isfinite(pruned(x)).all())


def test_half_precision():
    model = small_cnn().eval().to(torch.bfloat16)
    program = go.capture(model, (torch.randn(1, 3, 8, 8).to(torch.bfloat16),))
    pruned = Prune(schedule=PerLayer(0.5))(program)
    assert sparsity(effective(pruned)) == 0.5
    assert all(mask.dtype == torch.bfloat16 for mask in masks(pruned).values())


def test_weights_that_are_not_numbers_are_named():
    model = small_cnn()
    model.get_parameter("3.weight").data[0, 0, 0, 0] = torch.nan
    with pytest.raises(PassError) as caught:
        Prune()(capture(model, 2, 3, 8, 8))
    assert str(caught.value) == (
        "prune: score magnitude of '3.weight' is NaN or infinite; check the weights, the data and the loss"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "taylor"}, "prune: score must be a Score, not 'taylor'"),
        (
            {"loss": "hinge"},
            "prune: loss must be cross-entropy or mse or a function, not 'hinge'",
        ),
        ({"min_weights": 0}, "prune: min_weights must be at least 1, not 0"),
        (
            {"granularity": NM(), "schedule": Global(0.9)},
            "prune: the granularity fixes the sparsity at 0.5; leave out sparsity=0.9",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(PassError) as caught:
        Prune(**options)
    assert str(caught.value) == message


RECIPE = """
passes:
  - prune
  - prune:
      score: taylor
      schedule: {global: 0.9}
      granularity: block
      exclude: ["8"]
      keep_first: true
  - prune:
      score: {obd: {probes: 4, seed: 1}}
      schedule: {gradual: {sparsity: 0.8, updates: 10, every: 5, scope: per-layer}}
      granularity: {block: {inputs: 2, outputs: 8}}
      loss: mse
  - prune: {score: {activation: apoz}, schedule: per-layer, granularity: {n-m: {n: 1, m: 4}}}
"""


def test_a_recipe_holds_every_choice():
    data: Any = [object()]
    calibration: Any = [object()]
    passes = go.Pipeline.from_text(RECIPE, data=data, calibration=calibration).passes
    common: dict[str, Any] = {"data": data, "calibration": calibration}
    assert passes == (
        Prune(**common),
        Prune(Taylor(), Global(0.9), Block(), exclude=("8",), keep_first=True, **common),
        Prune(
            Obd(probes=4, seed=1),
            Gradual(0.8, updates=10, every=5, scope="per-layer"),
            Block(2, 8),
            loss="mse",
            **common,
        ),
        Prune(Activation("apoz"), PerLayer(), NM(1, 4), **common),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "{score: tailor}",
            "r.yaml:1: option 'score' of prune: no score is called 'tailor'; choose from taylor, not 'tailor'",
        ),
        (
            "{schedule: {global: much}}",
            "r.yaml:1: option 'schedule' of prune: option 'sparsity' of schedule global: Input should be a "
            "valid number, unable to parse string as a number, not 'much', not {'global': 'much'}",
        ),
        (
            "{granularity: {n-m: {n: 5}}}",
            "r.yaml:1: option 'granularity' of prune: granularity n-m: n must be at least 1 and less than m, "
            "not 5 of 4, not {'n-m': {'n': 5}}",
        ),
        (
            "{schedule: {global: 0.9}, granularity: n-m}",
            "r.yaml:1: prune: the granularity fixes the sparsity at 0.5; leave out sparsity=0.9",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(options, message):
    with pytest.raises(RecipeError) as caught:
        go.Pipeline.from_text(f"passes: [{{prune: {options}}}]", "r.yaml")
    assert str(caught.value) == message
