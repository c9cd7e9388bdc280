"""The int8 recipe in one pass."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import CalibrationError, RecipeError
from tests.passes.quantize.nets import capture, chain, conv, data


def with_batch_norm():
    norm = nn.BatchNorm2d(8)
    torch.manual_seed(3)
    with torch.no_grad():
        norm.get_buffer("running_mean").uniform_(-1, 1)
        norm.get_buffer("running_var").uniform_(0.5, 2)
    layers = {"a": conv(3, 8, bias=False), "n": norm, "b": conv(8, 4)}
    return capture(lambda m, x: m.b(torch.relu(m.n(m.a(x)))), 1, 3, 8, 8, **layers)


def test_folds_batch_norm_and_quantizes():
    program = with_batch_norm()
    quantized = go.passes.Quantize(calibration=data(program))(program)
    assert chain(quantized) == ["fq", "conv2d", "relu", "fq", "conv2d"]
    assert [record.name for record in quantized.history] == ["quantize"]
    error = quantized.history[-1].error
    assert error is not None
    assert error < 0.05  # int8 noise of two layers


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
    with pytest.raises(CalibrationError, match="quantize needs calibration data"):
        pipeline(with_batch_norm())


def test_a_recipe_with_an_unknown_observer_names_the_line():
    with pytest.raises(RecipeError) as error:
        go.Pipeline.from_text("passes:\n  - quantize: {observer: median}\n", "r.yaml")
    assert str(error.value) == (
        "r.yaml:2: observer 'median' is none of minmax, moving-average, percentile, mse, entropy"
    )


def test_biases_are_corrected_unless_told_otherwise():
    program = with_batch_norm()
    corrected = go.passes.Quantize(calibration=data(program))(program)
    plain = go.passes.Quantize(calibration=data(program), bias_correction=False)(program)
    assert corrected.history[-1].rewrites == plain.history[-1].rewrites + 2


def test_data_that_can_be_read_once_is_an_error():
    program = with_batch_norm()
    with pytest.raises(CalibrationError) as error:
        go.passes.Quantize(calibration=iter(data(program)))(program)
    assert str(error.value) == (
        "quantize reads the calibration data twice: pass a list or another iterable that can be "
        "read again, or bias_correction=False"
    )
    once = go.passes.Quantize(calibration=iter(data(program)), bias_correction=False)(program)
    assert once.history[-1].rewrites > 0


def test_a_program_that_is_fake_quantized_is_left_alone():
    program = with_batch_norm()
    once = go.passes.Quantize(calibration=data(program), bias_correction=False)(program)
    twice = go.passes.Quantize(calibration=data(program))(once)
    assert twice.history[-1].rewrites == 0


def test_a_network_that_ends_in_its_average_has_no_float_islands():
    """SqueezeNet: the classifier is a convolution, and its average is the output."""

    def body(m, x):
        y = nn.functional.max_pool2d(torch.relu(m.a(x)), 3, 2, ceil_mode=True)
        y = torch.cat([torch.relu(m.b(y)), torch.relu(m.c(y))], 1)
        y = torch.relu(m.d(nn.functional.dropout(y, 0.5, m.training)))
        return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)

    layers = {"a": conv(3, 8), "b": conv(8, 8, 1), "c": conv(8, 8), "d": conv(16, 5, 1)}
    program = capture(body, 2, 3, 12, 12, **layers)
    integer = go.integerize(go.passes.Quantize(calibration=data(program))(program))
    calls = [str(n.target) for n in integer.graph.nodes if n.op == "call_function"]
    assert calls[0] == "graphopt.quantize.default"
    assert calls[-2:] == ["graphopt.global_avg_pool_dequantize.default", "aten.flatten.using_ints"]
    assert sum("quantize" in name for name in calls) == 2
    assert go.backends.integerize.kept_in_float(integer) == ()


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "shuffle"])
def test_the_integer_level_has_no_float_islands(kind):
    """From the first quantize to the last layer, everything between is integer."""

    def resnet(m, x):
        a = nn.functional.max_pool2d(torch.relu(m.a(x)), 3, 2, 1)
        b = torch.relu(m.b(torch.relu(m.c(a))) + m.d(a))
        return m.f(nn.functional.adaptive_avg_pool2d(b, 1).flatten(1))

    def mobilenet(m, x):
        a = nn.functional.relu6(m.a(nn.functional.pad(x, (0, 1, 0, 1))))
        b = m.b(nn.functional.relu6(m.g(a))) + a
        return m.f(nn.functional.dropout(b.mean((2, 3)), 0.2, m.training))

    def shuffle(m, x):
        left, right = torch.relu(m.a(x)).chunk(2, 1)
        y = torch.cat([left, torch.relu(m.e(right))], 1)
        y = y.view(-1, 2, 4, 12, 12).transpose(1, 2).reshape(-1, 8, 12, 12)
        return m.f(torch.relu(m.b(y)).mean((2, 3)))

    layers = {name: conv(8, 8) for name in "bcd"}
    layers |= {"a": conv(3, 8), "g": conv(8, 8, groups=8), "e": conv(4, 4), "f": nn.Linear(8, 5)}
    body = {"resnet": resnet, "mobilenet": mobilenet, "shuffle": shuffle}[kind]
    program = capture(body, 2, 3, 12, 12, **layers)
    integer = go.integerize(go.passes.Quantize(calibration=data(program))(program))
    calls = [str(n.target) for n in integer.graph.nodes if n.op == "call_function"]
    assert calls[0] == "graphopt.quantize.default"
    assert calls[-1] == "graphopt.linear_dequantize.default"
    assert sum("quantize" in name for name in calls) == 2
    assert go.backends.integerize.kept_in_float(integer) == ()
