"""Whole networks through the int8 recipe: everything that can be is integer, and the results are the simulation's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import graphopt as go
from graphopt.backends.integerize import integerize, kept_in_float
from graphopt.passes import FoldBatchNorm
from graphopt.passes.quantize.insert_fake_quant import InsertFakeQuant
from tests.backends.integerize.simulate import names, simulate, steps_at_each_quantizer
from tests.models import MODELS
from tests.random_graphs import random_model

INTEGER_MODELS = ("resnet", "mobilenet", "squeezenet", "shufflenet", "mlp")


def _quantized(model: torch.nn.Module, x: torch.Tensor) -> go.Program:
    program = FoldBatchNorm()(go.capture(model, (x,)))
    result: go.Program = InsertFakeQuant(calibration=[x])(program)
    return result


def _check_steps(steps: dict[str, torch.Tensor], message: str = "") -> None:
    """Never more than a step, which rounding loses where a value is within 0.5 % of a tie; nearly all are equal.

    Below 200 values a share says nothing.
    """
    for name, values in steps.items():
        assert values.max() <= 1.001, f"{name}\n{message}"
        assert values.numel() < 200 or (values > 0.5).double().mean() <= 0.03, f"{name}\n{message}"


@pytest.mark.parametrize("name", INTEGER_MODELS)
def test_networks_of_integer_operators_have_no_float_between_the_borders(name: str) -> None:
    model, (x,) = MODELS[name]()
    integer = integerize(_quantized(model, x))
    found = names(integer)
    assert kept_in_float(integer) == ()
    assert found.count("quantize") == 1
    assert found[0] == "quantize"
    assert found[-1] == "linear_dequantize"
    assert "dequantize" not in found
    assert ".relu" not in found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_networks_compute_what_the_simulation_computes(name: str) -> None:
    model, (x,) = MODELS[name]()
    program = _quantized(model, x)
    _check_steps(steps_at_each_quantizer(program, x))
    with torch.no_grad():
        result = integerize(program)(x).double()
    reference = simulate(program, x)
    # From end to end: a step lost in one layer moves the sums of the next ones by less than one of 255 output steps.
    step = (reference.max() - reference.min()) / 255
    assert (result - reference).abs().max() <= 2.5 * step
    assert (result - reference).abs().mean() <= 0.25 * step


def test_what_has_no_integer_form_is_named_with_its_reason() -> None:
    model, (x,) = MODELS["transformer"]()
    integer = integerize(_quantized(model, x))
    reasons = {reason for _, reason in kept_in_float(integer)}
    assert "layer_norm has no integer form" in reasons
    assert "gelu has no integer form" in reasons
    assert "attention has no integer form" in reasons
    assert names(integer).count("linear_dequantize") == 8


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 10**6))
@example(255)
@example(3)
@example(241051)  # a dead activation, and a bias counted in its steps
def test_random_networks(seed: int) -> None:
    model, x = random_model(seed)
    program = _quantized(model, x)
    _check_steps(steps_at_each_quantizer(program, x), "\n".join(model.describe()))
    assert not any("fake_quantize" in name for name in names(integerize(program)))
