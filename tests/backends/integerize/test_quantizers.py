"""Parameters read from fake-quantize nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import graphopt as go
from graphopt.backends.integerize.constants import Constants
from graphopt.backends.integerize.quantizers import activation, is_fake_quantize, weight
from graphopt.errors import Decline, IntegerizeError
from graphopt.integer import QParams
from tests.backends.integerize.simulate import Weights, captured, fq, image

aten = torch.ops.aten


def _quantizers(program: go.Program) -> tuple[list[fx.Node], Constants]:
    nodes = [node for node in program.graph.nodes if is_fake_quantize(node)]
    return nodes, Constants(program)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.05, 128, 0, 255), QParams(0.05, 128)),
        ((0.05, -3, -128, 127), QParams(0.05, 125)),
        ((0.05, 0, -127, 127), QParams(0.05, 127, 0, 254)),
        ((0.5, 7, 0, 15), QParams(0.5, 7, 0, 15)),
        ((0.5, 12, 10, 20), QParams(0.5, 2, 0, 10)),
    ],
)
def test_activations_are_shifted_to_begin_at_zero(arguments: Any, expected: QParams) -> None:
    program = captured(lambda m, x: fq(x, *arguments), image(2, 3))
    (node,), constants = _quantizers(program)
    assert activation(node, constants) == expected


def test_scales_are_float32() -> None:
    assert QParams(0.1, 0).scale == float(torch.tensor(0.1))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda m, x: fq(x, 0.1, 0, 0, 256),
            "activations of the range 0..256 need more than 8 bits",
        ),
        (
            lambda m, x: aten.fake_quantize_per_channel_affine(x, m.scale, m.zero_point, 1, 0, 255),
            "activations quantized per channel have no integer form",
        ),
        (
            lambda m, x: aten.fake_quantize_per_tensor_affine.tensor_qparams(
                x, x.abs().max().reshape(1), m.zero_point[:1], 0, 255
            ),
            "its scale or zero point is no constant scalar",
        ),
    ],
)
def test_activations_declined(call: Any, reason: str) -> None:
    (node,), constants = _quantizers(captured(call, image(2, 3), weight=(3, 4)))
    with pytest.raises(Decline) as caught:
        activation(node, constants)
    assert str(caught.value) == reason


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_an_unusable_scale_names_its_node(scale: float) -> None:
    (node,), constants = _quantizers(captured(lambda m, x: fq(x, scale), image(2, 3)))
    message = r"^node 'fake_quantize_per_tensor_affine': an activation's scale is .*; it must be"
    with pytest.raises(IntegerizeError, match=message):
        activation(node, constants)


def test_weights_are_the_integers_that_torch_rounds_to() -> None:
    program = captured(lambda m, x: x @ m.quantized(), image(2, 9), weight=(9, 40))
    (node,), constants = _quantizers(program)
    module = Weights(lambda m: m, 9, 40)
    read = weight(node, constants)
    assert read.path == "weight"
    assert torch.equal(read.scale, module.scale)
    expected = torch.clamp(torch.round(module.weight * (1 / module.scale)[:, None]), -127, 127)
    assert torch.equal(read.q, expected.to(torch.int8))


def test_a_per_tensor_scale_stands_for_every_channel() -> None:
    def call(m: Weights, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.fake_quantize_per_tensor_affine(m.weight, 0.01, 0, -128, 127)

    (node,), constants = _quantizers(captured(call, image(2, 9), weight=(9, 40)))
    assert torch.equal(weight(node, constants).scale, torch.full((9,), 0.01))


def test_a_weight_computed_from_an_input_is_declined() -> None:
    (node,), constants = _quantizers(captured(lambda m, x: fq(x * 2), image(2, 3)))
    with pytest.raises(Decline) as caught:
        weight(node, constants)
    assert str(caught.value) == "its weight is computed from an input"


def test_constants_are_evaluated_and_random_numbers_are_not() -> None:
    def call(m: Weights, x: torch.Tensor) -> torch.Tensor:
        return x + (m.weight * torch.ones(3, 4)).sum() + torch.rand(2, 3)

    program = captured(call, image(2, 3), weight=(3, 4))
    constants = Constants(program)
    known = {node.name: constants.value(node) for node in program.graph.nodes}
    total = known["sum_1"]
    assert total is not None
    assert torch.equal(total, Weights(lambda m: m, 3, 4).weight.sum().detach())
    assert known["rand"] is None
    assert known["add"] is None
