"""Calibration data: its batches, and what is wrong with them."""

import pytest
import torch

import graphopt as go
from graphopt.errors import InputError, QuantizeError
from graphopt.passes.quantize import InsertFakeQuant
from tests.passes.quantize.nets import (
    Pair,
    activation_quantizers,
    capture,
    conv,
    data,
    insert,
)


def test_calibration_is_cut_to_the_captured_batch():
    program = capture(lambda m, x: m.a(x), 2, 3, 8, 8, a=conv(3, 8))
    batches = data(program, 4)
    one = InsertFakeQuant(calibration=batches)(program)
    all_at_once = InsertFakeQuant(calibration=[torch.cat(batches)])(program)
    assert activation_quantizers(one)[0].args[1:] == activation_quantizers(all_at_once)[0].args[1:]


def test_a_dynamic_batch_takes_any_batch():
    program = capture(lambda m, x: m.a(x), 2, 3, 8, 8, a=conv(3, 8), dynamic_batch=(1, 4))
    quantized = InsertFakeQuant(calibration=[torch.randn(9, 3, 8, 8), torch.randn(3, 3, 8, 8)])(
        program
    )
    assert quantized(torch.randn(3, 3, 8, 8)).shape == (3, 8, 8, 8)


def test_calibration_of_two_inputs_is_a_tuple():
    module = Pair(lambda m, x, y: m.a(x) + m.a(y), a=conv(3, 8)).eval()
    pair = (torch.randn(1, 3, 8, 8), 4 * torch.randn(1, 3, 8, 8))
    program = InsertFakeQuant(calibration=[pair, pair])(go.capture(module, pair))
    assert len(activation_quantizers(program)) == 2


def test_no_calibration_is_an_error():
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8))
    with pytest.raises(QuantizeError) as error:
        InsertFakeQuant()(program)
    assert str(error.value) == (
        "insert-fake-quant needs calibration data: pass calibration=batches, "
        "an iterable of input batches"
    )
    with pytest.raises(QuantizeError) as error:
        InsertFakeQuant(calibration=[])(program)
    assert str(error.value) == "insert-fake-quant: the calibration data holds no batch"


def test_calibration_of_a_wrong_shape_names_the_input():
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8))
    with pytest.raises(InputError) as error:
        InsertFakeQuant(calibration=[torch.randn(1, 3, 8, 9)])(program)
    assert str(error.value) == "input 'x' must have size 8 in dimension 3, not 9"


@pytest.mark.parametrize(("bad", "what"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_bad_calibration_data_names_the_input(bad, what):
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8))
    batches = data(program)
    batches[2][0, 0, 0, 0] = bad
    with pytest.raises(QuantizeError) as error:
        InsertFakeQuant(calibration=batches)(program)
    assert str(error.value) == (
        f"calibration batch 2 holds {what} in input 'x'; check how it is prepared"
    )


def test_a_value_that_becomes_nan_names_the_layer():
    def body(m, x):
        return m.b(torch.log(m.a(x)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4))
    with pytest.raises(QuantizeError) as error:
        insert(program)
    assert str(error.value) == (
        "calibration batch 0 makes NaN in the output of node 'log'; "
        "check the weights before it and the scale of the calibration data"
    )
