"""Pooling in integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from graphopt.backends.integerize import integerize, kept_in_float
from tests.backends.integerize.simulate import (
    assert_equal_steps,
    call_of,
    captured,
    fq,
    image,
    names,
)


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        (lambda x: functional.avg_pool2d(x, 2), "avg_pool2d"),
        (lambda x: functional.avg_pool2d(x, (3, 2), (2, 1), (1, 1)), "avg_pool2d"),
        (lambda x: functional.avg_pool2d(x, 3, 2, 1, True), "avg_pool2d"),
        (lambda x: functional.avg_pool2d(x, 3, 2, 1, True, False), "avg_pool2d"),
        (lambda x: functional.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d"),
        (lambda x: functional.adaptive_avg_pool2d(x, 1), "global_avg_pool"),
        (lambda x: functional.adaptive_avg_pool2d(x, (3, 4)), "avg_pool2d"),
        (lambda x: x.mean((2, 3)), "global_avg_pool"),
        (lambda x: x.mean((-1, -2), keepdim=True), "global_avg_pool"),
    ],
)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.05, 128), (0.03, 90)])
def test_averages(pool: Any, name: str, scale: float, zero_point: int) -> None:
    x = image(2, 4, 9, 8)
    program = captured(lambda m, x: fq(pool(fq(x)), scale, zero_point), x)
    integer = integerize(program)
    assert names(integer) == ["quantize", name, "dequantize"]
    assert kept_in_float(integer) == ()
    # Averages of few integers fall on ties often: at equal scales 1 in 4 windows of 2 x 2.
    assert_equal_steps(program, integer, x, step=scale, differ=0.15)


def test_a_pool_behind_relu_and_before_flatten() -> None:
    x = image(2, 4, 9, 8)
    program = captured(
        lambda m, x: fq(torch.flatten(functional.adaptive_avg_pool2d(fq(x).relu(), 1), 1), 0.01), x
    )
    integer = integerize(program)
    expected = ["quantize", "requantize", "global_avg_pool", ".flatten", "dequantize"]
    assert names(integer) == expected
    assert_equal_steps(program, integer, x, step=0.01)


@pytest.mark.parametrize(
    ("call", "node", "reason"),
    [
        (
            lambda x: functional.adaptive_avg_pool2d(x, (2, 4)),
            "adaptive_avg_pool2d",
            "an adaptive pool from [9, 8] to [2, 4] has windows of unequal size",
        ),
        (
            lambda x: x.mean(1),
            "mean",
            "only a mean over height and width has an integer form",
        ),
        (lambda x: functional.avg_pool2d(x[0], 2), "avg_pool2d", "its input is not [N, C, H, W]"),
    ],
)
def test_averages_that_stay_float(call: Any, node: str, reason: str) -> None:
    x = image(2, 4, 9, 8)
    program = captured(lambda m, x: fq(call(fq(x))), x)
    integer = integerize(program)
    assert dict(kept_in_float(integer))[node] == reason
    with torch.no_grad():
        assert torch.equal(integer(x), program(x))


@pytest.mark.parametrize(
    ("pool", "keepdim"),
    [
        (lambda x: functional.adaptive_avg_pool2d(x, 1), True),
        (lambda x: x.mean((2, 3)), False),
        (lambda x: x.mean((-1, -2), keepdim=True), True),
    ],
)
@pytest.mark.parametrize("ending", [lambda y: y, torch.sigmoid, lambda y: (y, fq(y, 0.01))])
def test_an_average_over_the_whole_map_may_end_in_float(
    pool: Any, keepdim: bool, ending: Any
) -> None:
    x = image(2, 4, 9, 8)
    program = captured(lambda m, x: ending(pool(fq(x))), x)
    integer = integerize(program)
    assert names(integer)[:2] == ["quantize", "global_avg_pool_dequantize"]
    call = call_of(integer, "global_avg_pool_dequantize")
    assert (call["multiplier"], call["x_zero_point"]) == (float(torch.tensor(0.05)), 128)
    assert call["keepdim"] is keepdim
    assert not any("avg" in node or "mean" in node for node, _ in kept_in_float(integer))
    with torch.no_grad():
        got, want = integer(x), program(x)
    got, want = (value[0] if isinstance(value, tuple) else value for value in (got, want))
    # The float program adds 72 products and the integer one none: their roundings differ.
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_average_read_in_float_and_quantized_is_summed_once() -> None:
    x = image(2, 4, 9, 8)

    def call(m: Any, x: torch.Tensor) -> Any:
        y = fq(x).mean((2, 3))
        return y, fq(y, 0.01)

    found = names(integerize(captured(call, x)))
    assert found == ["quantize", "global_avg_pool_dequantize", "quantize", "dequantize"]


def test_a_whole_adaptive_pool_is_a_copy() -> None:
    x = image(2, 4, 1, 1)
    integer = integerize(captured(lambda m, x: functional.adaptive_avg_pool2d(fq(x), 1), x))
    assert names(integer) == ["quantize", "dequantize"]


def test_an_average_kept_on_request_stays_float() -> None:
    x = image(2, 4, 9, 8)
    program = captured(lambda m, x: fq(x).mean((2, 3)), x)
    integer = integerize(program, keep_float=["mean"])
    assert kept_in_float(integer) == (("mean", "kept in float on request"),)


@pytest.mark.parametrize(
    ("call", "node", "reason"),
    [
        (
            lambda x: functional.adaptive_avg_pool2d(fq(x), (3, 4)),
            "adaptive_avg_pool2d",
            "its result is not fake-quantized",
        ),
        (
            lambda x: fq(x).mean(1),
            "mean",
            "only a mean over height and width has an integer form",
        ),
        (lambda x: x.mean((2, 3)), "mean", "its input is not fake-quantized"),
        (lambda x: fq(x[0]).mean((1, 2)), "mean", "its input is not [N, C, H, W]"),
    ],
)
def test_other_averages_that_end_in_float_stay_float(call: Any, node: str, reason: str) -> None:
    x = image(2, 4, 9, 8)
    program = captured(lambda m, x: call(x), x)
    integer = integerize(program)
    assert dict(kept_in_float(integer))[node] == reason
    with torch.no_grad():
        assert torch.equal(integer(x), program(x))


def test_an_average_over_windows_that_ends_in_float_stays_float() -> None:
    x = image(2, 4, 9, 8)
    integer = integerize(captured(lambda m, x: functional.avg_pool2d(fq(x), 2), x))
    assert names(integer) == ["quantize", "dequantize", ".avg_pool2d"]
    assert kept_in_float(integer) == (("avg_pool2d", "its result is not fake-quantized"),)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_of_a_float_layer_commutes_with_its_quantization(ceil_mode: bool) -> None:
    x = image(2, 4, 9, 8)
    program = captured(
        lambda m, x: fq(
            functional.max_pool2d(
                torch.relu(functional.conv2d(fq(x), m.quantized(), m.bias)), 3, 2, 1, 1, ceil_mode
            ),
            0.04,
            5,
        ),
        x,
        weight=(6, 4, 3, 3),
    )
    integer = integerize(program)
    assert names(integer) == ["quantize", "conv2d", "max_pool2d", "dequantize"]
    assert_equal_steps(program, integer, x, step=0.04)


def test_an_unbatched_max_pool_stays_float() -> None:
    x = image(4, 9, 8)
    program = captured(lambda m, x: fq(functional.max_pool2d(fq(x), 2)), x)
    integer = integerize(program)
    assert kept_in_float(integer) == (("max_pool2d", "its input is not [N, C, H, W]"),)
    with torch.no_grad():
        assert torch.equal(integer(x), program(x))
