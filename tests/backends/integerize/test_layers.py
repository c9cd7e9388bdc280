"""Convolutions and linear layers become integer ones: geometry, folded clamps and padding, biases, declines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

import graphopt as go
from graphopt.backends.integerize import integerize, kept_in_float
from graphopt.errors import IntegerizeError
from tests.backends.integerize.simulate import (
    Weights,
    assert_equal_steps,
    call_of,
    captured,
    fq,
    image,
    names,
)


def _conv(**options: Any) -> Any:
    return lambda m, x: fq(functional.conv2d(fq(x), m.quantized(), m.bias, **options))


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ((6, 5, 3, 3), {}),
        ((6, 5, 3, 3), {"padding": 1}),
        ((6, 5, 1, 1), {"stride": 2}),
        ((6, 5, 3, 2), {"stride": (2, 1), "padding": (2, 0)}),
        ((6, 5, 3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
        ((5, 1, 3, 3), {"groups": 5, "padding": 1}),
        ((10, 1, 5, 5), {"groups": 5, "padding": 2, "stride": 2}),
        ((6, 5, 4, 3), {"padding": "same"}),
        ((6, 5, 3, 3), {"padding": "valid"}),
    ],
)
def test_conv2d(weight: tuple[int, ...], options: dict[str, Any]) -> None:
    x = image(2, 5, 9, 8)
    program = captured(_conv(**options), x, weight=weight)
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert kept_in_float(integer) == ()
    assert_equal_steps(program, integer, x)


def test_grouped_conv2d_without_bias() -> None:
    x = image(1, 6, 5, 7)
    program = captured(
        lambda m, x: fq(functional.conv2d(fq(x), m.quantized(), None, groups=3)),
        x,
        weight=(9, 2, 3, 3),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert call_of(integer, "conv2d")["groups"] == 3
    assert integer.tensor(call_of(integer, "conv2d")["bias"]).tolist() == [0] * 9
    assert_equal_steps(program, integer, x)


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        (torch.relu, 40, 255),
        (functional.relu6, 40, 160),
        (lambda x: functional.hardtanh(x, -1.03, 1.03), 19, 61),
        (lambda x: x.clamp(min=0.5), 50, 255),
        (lambda x: x.clamp(max=-0.26), 0, 35),
        (lambda x: functional.relu6(x.clamp(-1, 3)), 40, 100),
        (lambda x: torch.relu(x.flatten(1)).reshape(2, 6, 7, 6), 40, 255),
    ],
)
def test_a_clamp_becomes_the_range_of_the_requantization(
    activation: Any, low: int, high: int
) -> None:
    x = image(2, 5, 9, 8)
    program = captured(
        lambda m, x: fq(activation(functional.conv2d(fq(x), m.quantized(), m.bias)), zero_point=40),
        x,
        weight=(6, 5, 3, 3),
    )
    integer = integerize(program)
    assert "relu" not in " ".join(names(integer))
    call = call_of(integer, "conv2d")
    assert (call["qmin"], call["qmax"]) == (low, high)
    assert_equal_steps(program, integer, x)


def test_zero_padding_in_front_joins_the_convolutions() -> None:
    x = image(2, 5, 9, 8)
    program = captured(
        lambda m, x: fq(
            functional.conv2d(functional.pad(fq(x), (0, 1, 2, 3)), m.quantized(), m.bias, padding=1)
        ),
        x,
        weight=(6, 5, 3, 3),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert call_of(integer, "conv2d")["padding"] == [3, 1, 4, 2]
    assert_equal_steps(program, integer, x)


@pytest.mark.parametrize("pad", [(1, -1), (0, 0, 0, 0, 1, 0)])
def test_other_zero_paddings_stay_a_padding_of_integers(pad: tuple[int, ...]) -> None:
    x = image(2, 5, 9, 8)
    channels = 6 if len(pad) == 6 else 5
    program = captured(
        lambda m, x: fq(functional.conv2d(functional.pad(fq(x), pad), m.quantized(), m.bias)),
        x,
        weight=(6, channels, 3, 3),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", ".constant_pad_nd", "conv2d", "dequantize"]
    assert_equal_steps(program, integer, x)


def test_conv1d_runs_as_a_conv2d_of_height_one() -> None:
    x = image(2, 5, 17)
    program = captured(
        lambda m, x: fq(
            functional.conv1d(fq(x), m.quantized(), m.bias, stride=2, padding=3, dilation=2)
        ),
        x,
        weight=(6, 5, 3),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", ".unsqueeze", "conv2d", ".squeeze", "dequantize"]
    assert_equal_steps(program, integer, x)


@pytest.mark.parametrize("shape", [(3, 11), (2, 5, 11), (11,)])
def test_linear(shape: tuple[int, ...]) -> None:
    x = image(*shape)
    program = captured(
        lambda m, x: fq(torch.relu(functional.linear(fq(x), m.quantized(), m.bias))),
        x,
        weight=(7, 11),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", "linear", "dequantize"]
    assert_equal_steps(program, integer, x)


def test_a_layer_that_ends_in_float_multiplies_its_accumulator() -> None:
    x = image(2, 5, 9, 8)
    program = captured(
        lambda m, x: functional.conv2d(fq(x), m.quantized(), m.bias), x, weight=(6, 5, 3, 3)
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d_dequantize"]
    reference = functional.conv2d(
        fq(x).double(), Weights(lambda m: m, 6, 5, 3, 3).quantized().double(), None
    )
    bias = Weights(lambda m: m, 6, 5, 3, 3).bias.double().reshape(-1, 1, 1)
    # The bias is rounded to half a step of s_x * s_w, about 0.05 * 0.004 / 2.
    assert (integer(x).double() - reference - bias).abs().max() < 2e-4


def test_weights_are_int8_and_biases_int32_and_float_tensors_are_gone() -> None:
    x = image(2, 5, 9, 8)
    integer = integerize(captured(_conv(), x, weight=(6, 5, 3, 3)))
    state = integer.graph_module.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "weight_int8": torch.int8,
        "bias_int32": torch.int32,
        "multiplier": torch.float32,
    }
    module = Weights(lambda m: m, 6, 5, 3, 3)
    scale = module.scale.double() * float(torch.tensor(0.05))
    assert torch.equal(state["bias_int32"].double(), torch.round(module.bias.double() / scale))
    multiplier = (scale / float(torch.tensor(0.05))).float()
    assert torch.equal(state["multiplier"], multiplier)
    restored = state["weight_int8"] * module.scale.reshape(-1, 1, 1, 1)
    assert torch.equal(restored, module.quantized())


def test_a_weight_computed_from_parameters_is_evaluated() -> None:
    x = image(2, 5, 9, 8)

    def masked(m: Weights, x: Tensor) -> Tensor:
        weight = m.weight * (m.weight.abs() > 0.1)
        w = torch.fake_quantize_per_channel_affine(weight, m.scale, m.zero_point, 0, -127, 127)
        return fq(functional.conv2d(fq(x), w, m.bias))

    program = captured(masked, x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    weight = integer.tensor(call_of(integer, "conv2d")["weight"])
    assert (weight == 0).double().mean() > 0.2
    assert_equal_steps(program, integer, x)


def test_a_weight_that_two_layers_share_is_held_once() -> None:
    x = image(2, 5, 9, 8)

    def twice(m: Weights, x: Tensor) -> Tensor:
        y = fq(functional.conv2d(fq(x), m.quantized(), m.bias, padding=1))
        return fq(functional.conv2d(y, m.quantized(), m.bias, padding=1))

    program = captured(twice, x, weight=(5, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "conv2d", "dequantize"]
    assert sum(v.dtype == torch.int8 for v in integer.graph_module.state_dict().values()) == 1
    assert_equal_steps(program, integer, x)


def test_per_tensor_weights_and_tensor_parameters() -> None:
    x = image(2, 5, 9, 8)

    def call(m: Weights, x: Tensor) -> Tensor:
        one, zero = m.scale.max(), m.zero_point[0]
        w = torch.fake_quantize_per_tensor_affine(m.weight, one, zero, -127, 127)
        return fq(functional.conv2d(fq(x), w, m.bias))

    program = captured(call, x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert_equal_steps(program, integer, x)


def test_learnable_fake_quantizers_round_and_clamp_their_zero_points() -> None:
    x = image(2, 5, 9, 8)
    aten = torch.ops.aten

    def call(m: Weights, x: Tensor) -> Tensor:
        zero = m.zero_point.float()
        w = aten._fake_quantize_learnable_per_channel_affine(m.weight, m.scale, zero, 0, -127, 127)
        scale, zero_point = m.scale[:1] * 0 + 0.05, m.scale[:1] * 0 + 127.6
        x = aten._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, 0, 255)
        return fq(functional.conv2d(x, w, m.bias))

    program = captured(call, x, weight=(6, 5, 3, 3))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert call_of(integer, "conv2d")["x_zero_point"] == 128
    with torch.no_grad():
        steps = ((integer(x) - program(x)) / 0.05).round().abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-2


def test_signed_activations_become_unsigned_ones_of_the_same_values() -> None:
    x = image(2, 5, 9, 8)
    program = captured(
        lambda m, x: fq(
            torch.relu(functional.conv2d(fq(x, 0.05, -3, -128, 127), m.quantized(-128), m.bias)),
            0.05,
            -120,
            -127,
            127,
        ),
        x,
        weight=(6, 5, 3, 3),
    )
    integer = integerize(program)
    call = call_of(integer, "conv2d")
    assert call["x"].meta["val"].dtype == torch.uint8
    assert (call["x_zero_point"], call["y_zero_point"]) == (125, 7)
    assert (call["qmin"], call["qmax"]) == (7, 254)
    assert_equal_steps(program, integer, x)


def test_a_channel_of_zeros_does_not_overflow_the_bias() -> None:
    x = image(2, 5, 9, 8)
    module = Weights(_conv(), 6, 5, 3, 3)
    module.weight.data[2] = 0
    module.scale[2] = 1e-30
    program = go.capture(module.eval(), (x,))
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "dequantize"]
    assert_equal_steps(program, integer, x)


# --- declines --------------------------------------------------------------------------------------------------------


def _declined(program: go.Program, x: Tensor) -> str:
    """The reason why the only layer stays float, having checked that it computes what it did."""
    integer = integerize(program)
    reasons = dict(kept_in_float(integer))
    with torch.no_grad():
        assert torch.equal(integer(x), program(x))
    assert "fake_quantize" not in " ".join(names(integer))
    ((_, reason),) = reasons.items()
    return reason


def test_declines_a_weight_that_is_not_fake_quantized() -> None:
    x = image(2, 5, 9, 8)
    program = captured(lambda m, x: fq(functional.conv2d(fq(x), m.weight)), x, weight=(6, 5, 3, 3))
    assert _declined(program, x) == "its weight is not fake-quantized"


def test_declines_an_input_that_is_not_fake_quantized() -> None:
    x = image(2, 5, 9, 8)
    program = captured(lambda m, x: fq(functional.conv2d(x, m.quantized())), x, weight=(6, 5, 3, 3))
    assert _declined(program, x) == "its input is not fake-quantized"


def test_declines_another_weight_axis() -> None:
    x = image(2, 6, 9, 8)
    program = captured(
        lambda m, x: fq(functional.conv2d(fq(x), m.quantized())), x, weight=(6, 6, 3, 3), axis=1
    )
    assert _declined(program, x) == "its weight is quantized along axis 1, not 0"


def test_declines_asymmetric_weights() -> None:
    x = image(2, 5, 9, 8)
    module = Weights(_conv(), 6, 5, 3, 3)
    module.zero_point[1] = 3
    program = go.capture(module.eval(), (x,))
    assert _declined(program, x) == "its weight is quantized asymmetrically"


def test_declines_unsigned_weights() -> None:
    x = image(2, 5, 9, 8)
    program = captured(
        lambda m, x: fq(functional.conv2d(fq(x), m.quantized(0, 255))), x, weight=(6, 5, 3, 3)
    )
    assert _declined(program, x) == "its weight does not fit int8"


def test_declines_a_bias_beyond_int32() -> None:
    x = image(2, 5, 9, 8)
    module = Weights(_conv(), 6, 5, 3, 3)
    module.bias.data[4] = 1e7
    program = go.capture(module.eval(), (x,))
    reason = "the bias of output channel 4 leaves int32 in steps of s_x * s_w"
    assert _declined(program, x) == reason


def test_declines_an_accumulator_that_could_leave_int32() -> None:
    x = image(1, 70000)

    def call(m: Weights, x: Tensor) -> Tensor:
        weight = torch.ones(2, 70000)
        w = torch.fake_quantize_per_tensor_affine(weight, 1 / 127, 0, -127, 127)
        return fq(functional.linear(fq(x), w), 1.0)

    program = captured(call, x)
    reason = _declined(program, x)
    assert reason.startswith(
        "the accumulator of output channel 0 can reach 2266950000, beyond int32"
    )


def test_declines_an_unbatched_convolution() -> None:
    x = image(5, 9, 8)
    program = captured(_conv(), x, weight=(6, 5, 3, 3))
    assert _declined(program, x) == "its input has no batch dimension"


def test_a_weight_scale_of_zero_is_an_error() -> None:
    x = image(2, 5, 9, 8)
    module = Weights(_conv(), 6, 5, 3, 3)
    module.scale[3] = 0.0
    program = go.capture(module.eval(), (x,))
    with pytest.raises(IntegerizeError, match=r"a weight's scale is zero, negative or not finite"):
        integerize(program)


def test_keep_float_names_a_layer() -> None:
    x = image(2, 5, 9, 8)
    program = captured(_conv(), x, weight=(6, 5, 3, 3))
    integer = integerize(program, keep_float=["conv2d"])
    assert names(integer) == ["quantize", "dequantize", ".conv2d", "quantize", "dequantize"]
    assert kept_in_float(integer) == (("conv2d", "kept in float on request"),)
    with torch.no_grad():
        assert torch.equal(integer(x), program(x))
