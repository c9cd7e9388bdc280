from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import Decline
from graphopt.pattern import Call, Match, Operators, match
from tests.models import example
from tests.passes.helpers import captured

X = example(2, 4)
OP = Operators()
x, w = go.var("x"), go.const("w")


def find(pattern: Call, function: Callable[..., Any], **parts: Any) -> Match | None:
    """The first place where the pattern fits."""
    program = captured(function, X, **parts)
    for node in program.graph.nodes:
        found = match(program, pattern, node)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize(
    ("pattern", "function", "fits"),
    [
        (OP.relu(x), torch.relu, True),
        (OP.relu(x), torch.sigmoid, False),
        (OP.relu(OP.sigmoid(x)), lambda t: torch.relu(torch.sigmoid(t)), True),
        (OP.relu(OP.sigmoid(x)), lambda t: torch.sigmoid(torch.relu(t)), False),
        (OP.any("relu", "relu6")(x), F.relu6, True),
        (OP.mul(x, 2), lambda t: t * 2, True),
        (OP.mul(x, 2), lambda t: t * 3, False),
        (OP.mul(OP.sigmoid(x), x), lambda t: t * torch.sigmoid(t), True),
        (OP.mul(x, OP.sigmoid(x)), lambda t: torch.sigmoid(t) * t, True),
        (OP.mul(x, OP.sigmoid(x)), lambda t: torch.sigmoid(t) * torch.relu(t), False),
        (OP.sub(OP.relu(x), x), lambda t: t - torch.relu(t), False),
        (OP.add(x, x), lambda t: t + t, True),
        (OP.add(x, x), lambda t: t + t.relu(), False),
        (OP.softmax(x, dim=1), lambda t: torch.softmax(t, 1), True),
        (OP.softmax(x, dim=0), lambda t: torch.softmax(t, 1), False),
        (OP.add(x, x, alpha=1), lambda t: t + t, True),  # a default filled in
    ],
)
def test_pattern(pattern: Call, function: Callable[[Tensor], Tensor], fits: bool) -> None:
    assert (find(pattern, function) is not None) == fits


def test_names_are_bound() -> None:
    pattern = OP.relu(OP.linear(x, w, go.const("b", optional=True), name="layer"), name="out")
    for bias in (False, True):
        found = find(pattern, lambda t, layer: layer(t).relu(), layer=nn.Linear(4, 3, bias=bias))
        assert found is not None
        assert found["x"].op == "placeholder"
        assert found["w"].target == "layer.weight"
        assert ("b" in found) == bias
        assert found.tensor("w").shape == (3, 4)
        assert found.shape("out") == (2, 3)
        assert found.argument("layer", "input") is found["x"]
        assert [node.name for node in found.nodes] == ["relu", "linear"]


def test_a_failed_commutation_leaves_no_bindings() -> None:
    pattern = OP.add(OP.mul(x, go.var("y")), OP.relu(x))
    found = find(pattern, lambda t: torch.relu(t) + torch.sigmoid(t) * t)
    assert found is not None
    assert found["x"].op == "placeholder"
    assert found["y"].name == "sigmoid"


def test_a_constant_is_no_computed_value() -> None:
    assert find(OP.linear(x, w), lambda t, v: F.linear(t, v * 2), v=example(3, 4)) is None


def test_unknown_operators_are_named() -> None:
    with pytest.raises(AttributeError, match=r"^no operator 'conv9d' in the op table$"):
        OP.conv9d(x)


def test_sole_use_and_unshared_decline() -> None:
    def function(t: Tensor, layer: nn.Module) -> Tensor:
        y = layer(t)
        result: Tensor = y.relu() + y + layer(t + 1)
        return result

    found = find(OP.relu(OP.linear(x, w, name="layer")), function, layer=nn.Linear(4, 4))
    assert found is not None
    with pytest.raises(Decline, match=r"^linear is read 2 times$"):
        found.sole_use("layer")
    with pytest.raises(Decline, match=r"^parameter layer.weight is shared by 2 layers$"):
        found.unshared("w")
