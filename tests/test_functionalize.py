"""In-place models captured: the program gives what eager gives, and leaves its input alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.contract import difference
from tests.models import example, randomize
from tests.passes.helpers import Calls, operators

X = example(2, 4, 6, 6)


def relu_then_read(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    y.relu_()
    return y + 1


def read_then_relu(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    z = y + 1
    y.relu_()
    return z * y


def view_before_write(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    z = y.flatten(2)
    y.mul_(2)
    return z


def unannounced_view_before_write(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    z = y.expand_as(y)
    y.relu_()
    return z


def cast_to_same_type_before_write(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    z = y.type_as(y)
    y.relu_()
    return z


def write_to_a_chunk(x: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor]:
    y: Tensor = conv(x)
    first, second = y.chunk(2, 1)
    first.relu_()
    return y + 1, first + second


def write_to_a_slice(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    y[:, 0].zero_()
    y.transpose(1, 2)[0] = 1
    return y


def evaluation_dropout_is_an_alias(x: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor]:
    y: Tensor = conv(x)
    z = F.dropout(y, 0.5, training=False)
    y += x
    return z, y


def out_argument(x: Tensor, conv: nn.Module) -> Tensor:
    y = x * 1
    torch.add(x, conv(x), out=y)
    return y


def write_to_the_input(x: Tensor, conv: nn.Module) -> Tensor:
    x.add_(1)
    result: Tensor = conv(x)
    return result


def relu_of_the_input(x: Tensor, conv: nn.Module) -> Tensor:
    y = F.relu(x, inplace=True)
    result: Tensor = conv(y) + x
    return result


def chained_writes(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    return y.clamp_(0, 1).mul_(2).add_(y)


def write_casts_to_the_old_type(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x).half()
    y += x
    return y


def inner_no_grad(x: Tensor, conv: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = conv(x).square()
    return y + x


@pytest.mark.parametrize(
    "function",
    [
        relu_then_read,
        read_then_relu,
        view_before_write,
        unannounced_view_before_write,
        cast_to_same_type_before_write,
        write_to_a_chunk,
        write_to_a_slice,
        evaluation_dropout_is_an_alias,
        out_argument,
        write_to_the_input,
        relu_of_the_input,
        chained_writes,
        write_casts_to_the_old_type,
        inner_no_grad,
    ],
    ids=lambda function: function.__name__,
)
def test_equals_eager(function: Callable[..., Any]) -> None:
    model = Calls(function, conv=nn.Conv2d(4, 4, 3, padding=1))
    program = go.capture(model, (X.clone(),))
    for node in program.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            assert not node.target._schema.is_mutable, node.format_node()
    x = X.clone()
    with torch.no_grad():
        want = model(X.clone())
        assert difference(want, program(x)) == 0.0
    assert torch.equal(x, X)  # a write to the input is not carried out on the caller's tensor


def test_batch_norm_and_dropout_stay_one_node() -> None:
    def function(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        y = F.relu(norm(conv(x)), inplace=True)
        return F.dropout(y, 0.5, training=True).flatten(1)

    norm = randomize(nn.BatchNorm2d(4))
    program = go.capture(Calls(function, conv=nn.Conv2d(4, 4, 1), norm=norm), (X,))
    assert operators(program) == ["conv2d", "batch_norm", "relu", "dropout", "flatten"]


def test_training_batch_norm_keeps_its_flag_and_updates_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train()
    eager = copy.deepcopy(model)
    program = go.capture(model, (X,))
    assert operators(program) == ["conv2d", "batch_norm", "relu"]
    assert torch.equal(program(X), eager(X))
    held = program.graph_module.get_buffer("1.running_mean")
    assert torch.equal(held, eager.get_buffer("1.running_mean"))


def test_a_buffer_that_counts_calls_goes_on_counting() -> None:
    def function(x: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        return x * seen

    program = go.capture(Calls(function, seen=torch.zeros(1)), (X,))
    assert torch.equal(program(X), X)
    assert torch.equal(program(X), X * 2)
