"""Calibration data: its batches, and what is wrong with them."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.edit import Edit
from graphopt.errors import CalibrationError, InputError
from graphopt.passes.calibration import RowSample, watch
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
    with pytest.raises(CalibrationError) as error:
        InsertFakeQuant()(program)
    assert str(error.value) == (
        "insert-fake-quant needs calibration data: pass calibration=batches, "
        "an iterable of input batches"
    )
    with pytest.raises(CalibrationError) as error:
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
    with pytest.raises(CalibrationError) as error:
        InsertFakeQuant(calibration=batches)(program)
    assert str(error.value) == (
        f"calibration batch 2 holds {what} in input 'x'; check how it is prepared"
    )


def test_a_value_that_becomes_nan_names_the_layer():
    def body(m, x):
        return m.b(torch.log(m.a(x)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4))
    with pytest.raises(CalibrationError) as error:
        insert(program)
    assert str(error.value) == (
        "calibration batch 0 makes NaN in the output of node 'log'; "
        "check the weights before it and the scale of the calibration data"
    )


def test_watch_shows_inputs_and_outputs_in_order():
    program = capture(lambda m, x: m.b(torch.relu(m.a(x))), 2, 3, 8, 8, a=conv(3, 8), b=conv(8, 4))
    first, second = (n for n in program.graph.nodes if n.name.startswith("conv2d"))
    weight, bias = (program.tensor(node).detach() for node in first.args[1:3])
    seen = []
    watch(Edit(program, "p"), [second, first], data(program, 3), lambda *item: seen.append(item))
    assert [node for node, _, _ in seen] == [first, second] * 3
    for batch, (_, given, made) in zip(data(program, 3), seen[::2], strict=True):
        assert torch.equal(given, batch)
        assert torch.equal(made, torch.conv2d(batch, weight, bias, padding=1))
    for (_, _, before), (_, given, made) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(given, torch.relu(before))
        assert not made.requires_grad


def test_what_follows_the_last_watched_layer_is_not_run():
    program = capture(lambda m, x: torch.log(m.a(x)), 1, 3, 8, 8, a=conv(3, 8))
    layer = next(n for n in program.graph.nodes if n.name == "conv2d")
    watch(Edit(program, "p"), [layer], data(program), lambda *item: None)  # the log makes NaN


def test_watch_needs_data():
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8))
    with pytest.raises(CalibrationError) as error:
        watch(Edit(program, "p"), [], [], lambda *item: None)
    assert str(error.value) == "p: the calibration data holds no batch"


def offer(sample, start, count):
    """Rows ``start`` to ``start + count``, each a number and its negative; how many of them were made."""
    made = []

    def take(index):
        made.extend(index.tolist())
        rows = torch.arange(start, start + count)[index]
        return rows, -rows

    sample.add(count, take)
    return len(made)


def test_a_row_sample_holds_every_row_up_to_its_limit():
    sample = RowSample(10)
    for start in (0, 4):
        assert offer(sample, start, 4) == 4
    kept, negated = sample.rows()
    assert kept.tolist() == list(range(8))
    assert torch.equal(negated, -kept)


def test_a_row_sample_is_uniform_bounded_and_seeded():
    def draw(seed):
        sample = RowSample(100, seed)
        for start in range(0, 1000, 50):
            offer(sample, start, 50)
        return sample.rows()[0]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    counts = torch.zeros(1000)
    for seed in range(200):
        rows = draw(seed)
        assert len(rows.unique()) == 100
        counts[rows] += 1
    # each row is in a tenth of the samples: a tenth of the rows' mean of 200 draws has deviation 0.2
    blocks = counts.reshape(10, 100).mean(dim=1)
    assert (blocks - 20).abs().max() < 1.5


def test_rows_that_do_not_enter_are_not_made():
    sample = RowSample(2)
    made = sum(offer(sample, start, 10) for start in range(0, 1000, 10))
    assert sample.seen == 1000
    assert made < 40  # about 2 * ln(1000 / 2)


def test_a_program_in_training_mode_is_not_run():
    program = capture(lambda m, x: m.norm(m.a(x)), 2, 3, 8, 8, a=conv(3, 8), norm=nn.BatchNorm2d(8))
    layer = next(n for n in program.graph.nodes if n.name == "conv2d")
    seen: list[int] = []
    training = program.train()
    with pytest.raises(CalibrationError) as error:
        watch(Edit(training, "p"), [layer], data(program), lambda *item: seen.append(1))
    assert str(error.value) == (
        "p: calibration runs a program in evaluation mode; call program.eval() before"
    )
    assert not seen
