"""The int8 recipe in one pass."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import QuantizeError, RecipeError
from tests.passes.quantize.nets import capture, chain, conv, data


def with_batch_norm():
    norm = nn.BatchNorm2d(8)
    torch.manual_seed(3)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    layers = {"a": conv(3, 8, bias=False), "n": norm, "b": conv(8, 4)}
    return capture(lambda m, x: m.b(torch.relu(m.n(m.a(x)))), 1, 3, 8, 8, **layers)


def test_folds_batch_norm_and_quantizes():
    program = with_batch_norm()
    quantized = go.passes.Quantize(calibration=data(program))(program)
    assert chain(quantized) == ["fq", "conv2d", "relu", "fq", "conv2d"]
    assert [record.name for record in quantized.history] == ["quantize"]
    assert quantized.history[-1].error < 0.05  # int8 noise of two layers


def test_a_second_run_rewrites_nothing():
    program = with_batch_norm()
    once = go.passes.Quantize(calibration=data(program))(program)
    twice = go.passes.Quantize(calibration=data(program))(once)
    assert twice.history[-1].rewrites == 0
    assert ("conv2d_1", "already fake-quantized") in twice.history[-1].declines


def test_per_tensor_weights():
    program = with_batch_norm()
    quantized = go.passes.Quantize(calibration=data(program), per_channel=False)(program)
    assert not [n for n in quantized.graph.nodes if ops.is_op(n, "fake_quantize_channel")]


def test_a_recipe_supplies_the_calibration_by_keyword():
    program = with_batch_norm()
    text = "passes:\n  - quantize: {observer: percentile, percentile: 99.9, exclude: [b]}\n"
    pipeline = go.Pipeline.from_text(text, calibration=data(program))
    quantized = pipeline(program)
    assert chain(quantized) == ["fq", "conv2d", "relu", "conv2d"]


def test_a_recipe_without_calibration_fails_when_it_runs():
    pipeline = go.Pipeline.from_text("passes: [quantize]")
    with pytest.raises(QuantizeError, match="quantize needs calibration data"):
        pipeline(with_batch_norm())


def test_a_recipe_with_an_unknown_observer_names_the_line():
    with pytest.raises(RecipeError) as error:
        go.Pipeline.from_text("passes:\n  - quantize: {observer: median}\n", "r.yaml")
    assert str(error.value) == (
        "r.yaml:2: observer 'median' is none of minmax, moving-average, percentile, mse, entropy"
    )
