"""Bias correction."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import CalibrationError
from graphopt.passes.quantize import CorrectBias, InsertFakeQuant, QuantizationSpec, WeightSpec
from tests.passes.quantize.nets import capture, conv, data, declines

COARSE = QuantizationSpec(weights=WeightSpec(bits=3, per_channel=False))


def network(**options):
    def body(m, x):
        y = nn.functional.max_pool2d(torch.relu(m.a(x)), 2)
        return m.c(torch.relu(m.b(y)).mean((2, 3)))

    layers = {"a": conv(3, 8, **options), "b": conv(8, 8), "c": nn.Linear(8, 4)}
    return capture(body, 2, 3, 8, 8, **layers)


def positive(program):
    return [batch.abs() for batch in data(program)]


def mean_error(program, reference, batches):
    with torch.no_grad():
        return sum((program(x) - reference(x)).mean(0) for x in batches) / len(batches)


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_error_of_a_layer_becomes_zero(bias):
    program = capture(lambda m, x: m.a(x), 2, 3, 8, 8, a=conv(3, 8, bias=bias))
    batches = positive(program)
    quantized = InsertFakeQuant(calibration=batches, spec=COARSE)(program)
    corrected = CorrectBias(calibration=batches)(quantized)
    before = mean_error(quantized, program, batches).mean((1, 2)).abs().max()
    after = mean_error(corrected, program, batches).mean((1, 2)).abs().max()
    assert before > 1e-2
    assert after < 1e-5  # float32 sums over 512 positions


def test_every_layer_is_corrected_and_the_output_gets_better():
    program = network()
    batches = positive(program)
    quantized = InsertFakeQuant(calibration=batches, spec=COARSE)(program)
    corrected = CorrectBias(calibration=batches)(quantized)
    assert corrected.history[-1].rewrites == 3
    assert [n.target for n in corrected.graph.nodes if ops.is_op(n, "conv2d", "linear")] == [
        n.target for n in program.graph.nodes if ops.is_op(n, "conv2d", "linear")
    ]
    before = mean_error(quantized, program, batches).norm()
    assert mean_error(corrected, program, batches).norm() < 0.5 * before


def test_the_old_program_keeps_its_bias():
    program = network()
    quantized = InsertFakeQuant(calibration=positive(program), spec=COARSE)(program)
    x = program.example_inputs[0]
    before = quantized(x)
    CorrectBias(calibration=positive(program))(quantized)
    assert torch.equal(quantized(x), before)


def test_a_second_run_rewrites_nothing():
    program = network()
    quantized = InsertFakeQuant(calibration=positive(program), spec=COARSE)(program)
    once = CorrectBias(calibration=positive(program))(quantized)
    twice = CorrectBias(calibration=positive(program))(once)
    assert twice.history[-1].rewrites == 0
    assert set(declines(twice).values()) == {"its bias is corrected already"}


def test_declines_a_float_layer():
    program = network()
    spec = QuantizationSpec(exclude=("b",))
    quantized = InsertFakeQuant(calibration=data(program), spec=spec)(program)
    corrected = CorrectBias(calibration=data(program))(quantized)
    assert declines(corrected) == {"conv2d_1": "its weight is not fake-quantized"}


def test_declines_a_computed_bias():
    layer = nn.Linear(4, 4)
    program = capture(lambda m, x: nn.functional.linear(x, m.a.weight, m.a.bias * 2), 2, 4, a=layer)
    quantized = InsertFakeQuant(calibration=data(program))(program)
    corrected = CorrectBias(calibration=data(program))(quantized)
    assert declines(corrected) == {"linear": "its bias is computed"}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            None,
            "correct-bias needs calibration data: pass calibration=batches, "
            "an iterable of input batches",
        ),
        ([], "correct-bias: the calibration data holds no batch"),
        (
            [torch.full((2, 3, 8, 8), float("nan"))],
            "correct-bias: the correction of node 'conv2d' (layer 'a') is not finite; "
            "check the calibration data",
        ),
    ],
)
def test_bad_calibration(calibration, message):
    program = network()
    quantized = go.passes.InsertFakeQuant(calibration=data(program))(program)
    with pytest.raises(CalibrationError) as error:
        CorrectBias(calibration=calibration)(quantized)
    assert str(error.value) == message
