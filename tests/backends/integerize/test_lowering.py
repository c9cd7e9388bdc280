"""Sums, concatenations, copies, clamps and the borders between integers and floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.integerize import integerize, kept_in_float
from graphopt.passes.quantize.insert_fake_quant import InsertFakeQuant
from tests.backends.integerize.simulate import (
    Weights,
    assert_equal_steps,
    call_of,
    captured,
    fq,
    image,
    names,
)


def _identical(program: Any, integer: Any, *inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(integer(*inputs), program(*inputs))


# --- sums ------------------------------------------------------------------------------------------------------------


def test_a_sum_of_two_scales() -> None:
    x, y = image(2, 5, 9, 8), image(2, 5, 9, 8, seed=2)
    program = captured(lambda m, x, y: fq(fq(x) + fq(y, 0.0313, 100), 0.0611, 120), x, y)
    integer = integerize(program)
    assert names(integer) == ["quantize", "quantize", "add", "dequantize"]
    assert_equal_steps(program, integer, x, y, step=0.0611)


def test_a_sum_with_relu_clamps_at_the_zero_point() -> None:
    x, y = image(2, 5, 9, 8), image(2, 5, 9, 8, seed=2)
    program = captured(lambda m, x, y: fq(torch.relu(fq(x) + fq(y, 0.0313)), 0.0411, 17), x, y)
    integer = integerize(program)
    assert names(integer) == ["quantize", "quantize", "add", "dequantize"]
    assert (call_of(integer, "add")["qmin"], call_of(integer, "add")["qmax"]) == (17, 255)
    assert_equal_steps(program, integer, x, y, step=0.0411)


def test_a_value_added_to_itself() -> None:
    x = image(2, 5)
    program = captured(lambda m, x: fq((lambda q: q + q)(fq(x)), 0.1), x)
    integer = integerize(program)
    assert names(integer) == ["quantize", "add", "dequantize"]
    _identical(program, integer, x)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, y: fq(fq(x) + fq(y[:1])), "a broadcasting sum has no integer form"),
        (lambda x, y: fq(fq(x) + y), "its input is not fake-quantized"),
        (
            lambda x, y: fq(torch.add(fq(x), fq(y), alpha=2)),
            "only a plain sum of two tensors has an integer form",
        ),
        (lambda x, y: fq(fq(x) + 1.0), "only a plain sum of two tensors has an integer form"),
        (lambda x, y: fq(x) + fq(y), "its result is not fake-quantized"),
    ],
)
def test_sums_that_stay_float(call: Any, reason: str) -> None:
    x, y = image(2, 5), image(2, 5, seed=2)
    program = captured(lambda m, x, y: call(x, y), x, y)
    integer = integerize(program)
    assert dict(kept_in_float(integer))["add"] == reason
    _identical(program, integer, x, y)


def test_a_fake_quantized_parameter_joins_a_sum_as_integers() -> None:
    x = image(6, 5)
    program = captured(lambda m, x: fq(fq(x) + fq(m.weight, 0.02)), x, weight=(6, 5))
    integer = integerize(program)
    assert names(integer) == ["quantize", "quantize", "add", "dequantize"]
    assert_equal_steps(program, integer, x)


# --- concatenation ---------------------------------------------------------------------------------------------------


def test_a_concatenation_of_equal_parameters_copies() -> None:
    x, y = image(2, 3, 4, 4), image(2, 5, 4, 4, seed=2)
    program = captured(lambda m, x, y: fq(torch.cat([fq(x), fq(y)], 1)), x, y)
    integer = integerize(program)
    assert names(integer) == ["quantize", "quantize", ".cat", "dequantize"]
    _identical(program, integer, x, y)


def test_a_concatenation_requantizes_what_differs() -> None:
    x, y = image(2, 3, 4, 4), image(2, 5, 4, 4, seed=2)
    program = captured(lambda m, x, y: fq(torch.cat([fq(x), fq(y, 0.03, 90), fq(x)], 1)), x, y)
    integer = integerize(program)
    assert names(integer) == ["quantize", "quantize", "requantize", ".cat", "dequantize"]
    _identical(program, integer, x, y)


def test_a_concatenation_takes_layers_at_its_own_scale() -> None:
    x = image(2, 5, 4, 4)

    def fire(m: Weights, x: Tensor) -> Tensor:
        x = fq(x)
        a = torch.relu(functional.conv2d(x, m.quantized(), m.bias))
        return fq(torch.cat([a, functional.max_pool2d(x, 3, 1, 1)], 1), 0.0411)

    program = captured(fire, x, weight=(6, 5, 1, 1))
    integer = integerize(program)
    expected = ["quantize", "conv2d", "max_pool2d", "requantize", ".cat", "dequantize"]
    assert sorted(names(integer)) == sorted(expected)
    assert kept_in_float(integer) == ()
    assert_equal_steps(program, integer, x, step=0.0411)


def test_a_concatenation_of_floats_alone_stays_float() -> None:
    x = image(2, 3, 4, 4)
    program = captured(lambda m, x: fq(torch.cat([torch.sigmoid(x), torch.tanh(x)], 1)), x)
    integer = integerize(program)
    assert names(integer) == [".sigmoid", ".tanh", ".cat", "quantize", "dequantize"]
    _identical(program, integer, x)


# --- copies ----------------------------------------------------------------------------------------------------------


def _shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
    return y.reshape(batch, channels, height, width)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: x.reshape(2, 4, -1),
        lambda x: x.view(2, 2, 2, 6, 4),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.transpose(1, 3),
        lambda x: x[:, 1:3, ::2],
        lambda x: x[:, :, -1],
        lambda x: x.contiguous(),
        lambda x: x.unsqueeze(2).squeeze(2),
        lambda x: functional.pixel_shuffle(x, 2),
        lambda x: functional.pixel_unshuffle(x, 2),
        lambda x: functional.channel_shuffle(x, 2),
        lambda x: functional.dropout(x, 0.5, training=False),
        lambda x: functional.adaptive_avg_pool2d(x, (6, 4)),
        lambda x: x.chunk(2, 1)[1],
        lambda x: x.split([1, 3], 1)[0],
        lambda x: x.split(3, 2)[1],
        lambda x: x.flip(2),
        lambda x: x[:1].expand(5, 4, 6, 4),
        lambda x: functional.pad(x, (1, 2, 0, 1)),
        lambda x: torch.relu(x),
        lambda x: x.clamp(-1, 3),
        lambda x: functional.max_pool2d(x, 2),
        lambda x: torch.cat([x, x], 3),
        _shuffle,
    ],
)
def test_what_keeps_the_parameters_passes_in_integers(copy: Any) -> None:
    x = image(2, 4, 6, 4)
    program = captured(lambda m, x: fq(copy(fq(x))), x)
    integer = integerize(program)
    found = names(integer)
    assert (found[0], found[-1]) == ("quantize", "dequantize")
    assert found.count("quantize") == found.count("dequantize") == 1
    assert kept_in_float(integer) == ()
    _identical(program, integer, x)
    # The same at another scale costs one requantization and still no float.
    other = captured(lambda m, x: fq(copy(fq(x)), 0.11, 77), x)
    integer = integerize(other)
    assert names(integer).count("requantize") == 1
    assert names(integer).count("quantize") == 1
    _identical(other, integer, x)


def test_a_float_reader_of_a_copy_reads_the_dequantized_copy() -> None:
    x = image(2, 4, 6, 4)
    program = captured(lambda m, x: torch.sigmoid(functional.max_pool2d(fq(x), 2)), x)
    integer = integerize(program)
    assert names(integer) == ["quantize", "max_pool2d", "dequantize", ".sigmoid"]
    _identical(program, integer, x)


def test_a_layer_behind_copies_takes_its_clamp_and_scale_from_behind_them() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        y = functional.conv2d(fq(x), m.quantized(), m.bias)
        return fq(torch.flatten(torch.relu(y), 1), 0.04, 3)

    program = captured(call, x, weight=(4, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", ".flatten", "dequantize"]
    assert_equal_steps(program, integer, x, step=0.04)


# --- clamps ----------------------------------------------------------------------------------------------------------


def test_a_lone_clamp_between_scales_is_one_requantization() -> None:
    x = image(2, 5, 6, 4)
    program = captured(lambda m, x: fq(functional.relu6(fq(x)), 0.03, 9), x)
    integer = integerize(program)
    assert names(integer) == ["quantize", "requantize", "dequantize"]
    assert call_of(integer, "requantize")["qmin"] == 9
    assert call_of(integer, "requantize")["qmax"] == 9 + 200
    _identical(program, integer, x)


def test_a_clamp_off_the_grid_stays_float_where_its_result_does() -> None:
    x = image(2, 5, 6, 4)
    program = captured(lambda m, x: torch.sigmoid(fq(x).clamp(-1.03, 1.02)), x)
    integer = integerize(program)
    assert names(integer) == ["quantize", "dequantize", ".clamp", ".sigmoid"]
    assert dict(kept_in_float(integer))["clamp"] == "its result is not fake-quantized"
    _identical(program, integer, x)


def test_relu_of_a_float_joins_the_quantization() -> None:
    x = image(2, 5, 6, 4)
    program = captured(lambda m, x: fq(torch.relu(torch.tanh(x)), 0.01, 3), x)
    integer = integerize(program)
    assert names(integer) == [".tanh", "quantize", "dequantize"]
    assert call_of(integer, "quantize")["qmin"] == 3
    _identical(program, integer, x)


# --- borders ---------------------------------------------------------------------------------------------------------


def test_equal_quantizers_of_one_value_are_one() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        y = functional.conv2d(fq(x), m.quantized(), m.bias, padding=1)
        return fq(fq(y) + fq(y), 0.1)

    program = captured(call, x, weight=(5, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "add", "dequantize"]
    assert_equal_steps(program, integer, x, step=0.1)


def test_a_result_quantized_twice_is_accumulated_once() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        y = functional.conv2d(fq(x), m.quantized(), m.bias, padding=1)
        return fq(y) * fq(y, 0.02)

    program = captured(call, x, weight=(5, 5, 3, 3))
    found = names(integerize(program))
    assert found.count("conv2d_dequantize") == 1
    assert "conv2d" not in found


def test_a_value_read_by_integers_and_floats() -> None:
    x = image(2, 5, 6, 4)

    def gated(m: Weights, x: Tensor) -> Tensor:
        x = fq(x)
        y = fq(functional.conv2d(x, m.quantized(), m.bias, padding=1))
        return fq(y * torch.sigmoid(x), 0.03)

    program = captured(gated, x, weight=(5, 5, 3, 3))
    integer = integerize(program)
    found = names(integer)
    assert found.count("dequantize") == 3
    assert found.count("conv2d") == 1
    assert [node for node, _ in kept_in_float(integer)] == ["sigmoid", "mul"]
    assert_equal_steps(program, integer, x, step=0.03)


def test_hard_swish_runs_between_a_float_result_and_a_quantization() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        y = functional.hardswish(functional.conv2d(fq(x), m.quantized(), m.bias))
        return fq(y, 0.03)

    program = captured(call, x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    expected = ["quantize", "conv2d_dequantize", ".hardswish", "quantize", "dequantize"]
    assert names(integer) == expected
    assert kept_in_float(integer) == (("hardswish", "hardswish has no integer form"),)
    assert_equal_steps(program, integer, x, step=0.03)


def test_several_outputs_and_a_quantized_output_that_goes_on() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Any:
        x = fq(x)
        y = fq(functional.conv2d(x, m.quantized(), m.bias, padding=1))
        return y, fq(x + y, 0.0937), x

    program = captured(call, x, weight=(5, 5, 3, 3))
    integer = integerize(program)
    assert names(integer).count("dequantize") == 3
    with torch.no_grad():
        for old, new, step in zip(program(x), integer(x), (0.05, 0.0937, 0.05), strict=True):
            steps = ((old - new) / step).round().abs()
            assert steps.max() <= 1
            assert (steps > 0).float().mean() < 1e-2


def test_wide_activations_stay_fake_quantized() -> None:
    x = image(2, 5)
    program = captured(lambda m, x: fq(x, 1e-4, 100, 0, 65535), x)
    integer = integerize(program)
    assert names(integer) == [".fake_quantize_per_tensor_affine"]
    _identical(program, integer, x)


def test_a_program_without_fake_quantizers_is_left_as_it_is() -> None:
    x = image(2, 5, 6, 4)
    program = captured(lambda m, x: functional.conv2d(x, m.weight), x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == [".conv2d"]
    assert integer.history[-1].rewrites == 0
    assert kept_in_float(integer) == (("conv2d", "its input is not fake-quantized"),)


def test_a_second_run_rewrites_nothing() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        return fq(functional.conv2d(fq(x), m.quantized(), m.bias) * 2)

    program = captured(call, x, weight=(6, 5, 3, 3))
    once = integerize(program)
    twice = integerize(once)
    assert twice.history[-1].rewrites == 0
    assert names(twice) == names(once)


def test_new_nodes_carry_provenance_and_the_module_of_their_layer() -> None:
    x = image(2, 5, 6, 4)

    def call(m: Weights, x: Tensor) -> Tensor:
        return fq(torch.relu(functional.conv2d(fq(x), m.quantized(), m.bias)))

    program = captured(call, x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    (conv,) = (n for n in integer.graph.nodes if n.target is torch.ops.graphopt.conv2d.default)
    assert {"conv2d", "relu"} <= set(conv.meta["provenance"])
    assert "nn_module_stack" in conv.meta
    assert conv.meta["val"].dtype == torch.uint8
    assert "weight" in program.graph_module.state_dict()  # the input program is untouched


def test_an_open_batch_reads_its_size_from_the_input() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 6, 3)
            self.linear = nn.Linear(48, 7)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x))
            result: Tensor = self.linear(y.reshape(y.shape[0], -1))
            return result

    torch.manual_seed(0)
    x = image(2, 5, 6, 4)
    program = go.capture(Flat().eval(), (x,), dynamic_batch=(1, 8))
    program = InsertFakeQuant(calibration=[image(8, 5, 6, 4)])(program)
    integer = integerize(program)
    assert set(names(integer)) == {
        "quantize", "conv2d", ".sym_size", ".reshape", "linear_dequantize",
    }  # fmt: skip
    for batch in (1, 7):
        x = image(batch, 5, 6, 4, seed=batch)
        with torch.no_grad():
            assert (integer(x) - program(x)).abs().max() < 5e-3


def test_padding_leaves_a_dynamic_batch_open() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    program = go.capture(Padded().eval(), (image(2, 3, 6, 6),), dynamic_batch=(1, 8))
    integer = integerize(InsertFakeQuant(calibration=[image(8, 3, 6, 6)])(program))
    assert isinstance(integer.inputs[0].meta["val"].shape[0], torch.SymInt)
    assert integer(image(5, 3, 6, 6)).shape == (5, 4, 5, 5)
