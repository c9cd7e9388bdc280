"""What may join a kernel's epilogue: activations it knows, and the residual sum that stands next."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cpu.workload import Activation
from graphopt.backends.lower.step import value_of

_BOUND_NAMES = {
    "hardtanh": ("min_val", "max_val"),
    "clamp": ("min", "max"),
    "clamp_min": ("min", ""),
}


def sole_user(node: fx.Node | None) -> fx.Node | None:
    """The one call that reads ``node``, or None where there are more, or it is an output."""
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op == "call_function" else None


def activation_of(node: fx.Node | None) -> Activation | None:
    """The epilogue's form of an activation call, or None where it has none."""
    op = ops.info(node)
    if node is None or op is None or op.kind != "activation":
        return None
    if value_of(node).dtype != torch.float32:
        return None
    arguments = ops.bind(node)
    if op.name in ("relu", "relu6", "sigmoid", "silu", "tanh"):
        return Activation(op.name)
    if op.name == "hardswish":
        return Activation("hard_swish")
    if op.name == "hardsigmoid":
        return Activation("hard_sigmoid")
    if op.name == "leaky_relu":
        return Activation("leaky_relu", low=float(arguments["negative_slope"]))
    if op.name == "gelu" and arguments["approximate"] == "none":
        return Activation("gelu")
    bounds = _bounds(op.name, arguments)
    return None if bounds is None else Activation("clamp", *bounds)


def following_activation(node: fx.Node) -> tuple[list[fx.Node], Activation | None]:
    """The activation that alone reads ``node``, as the nodes to swallow and the epilogue's form."""
    user = sole_user(node)
    activation = activation_of(user)
    return ([user], activation) if user is not None and activation is not None else ([], None)


def _bounds(name: str, arguments: dict[str, Any]) -> tuple[float, float] | None:
    low_name, high_name = _BOUND_NAMES.get(name, ("", ""))
    low, high = arguments.get(low_name), arguments.get(high_name)
    if not isinstance(low, int | float) and not isinstance(high, int | float):
        return None
    return (
        float("-inf") if low is None else float(low),
        float("inf") if high is None else float(high),
    )


def later_residual(node: fx.Node, add: fx.Node) -> fx.Node | None:
    """The other operand of ``add`` where the sum can run in ``node``'s epilogue, else None.

    It can where both operands are whole tensors of one shape and the other one comes first: a kernel that carries the
    sum runs where the sum stood, and of two that could, the later carries it.
    """
    operands = [value for value in add.args[:2] if isinstance(value, fx.Node)]
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    other = operands[1] if operands[0] is node else operands[0]
    if other.op == "get_attr" or value_of(other).dtype != value_of(node).dtype:
        return None
    shapes = [[str(size) for size in value_of(value).shape] for value in (node, other, add)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        return None
    return other if _comes_first(other, node) else None


def _comes_first(a: fx.Node, b: fx.Node) -> bool:
    return bool(a < b)
