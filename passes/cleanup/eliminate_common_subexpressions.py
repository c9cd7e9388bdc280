"""Compute equal expressions once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.contract import exact
from graphopt.edit import Edit
from graphopt.passing import Pass
from graphopt.registry import register


def _key(value: Any) -> Hashable:
    """Equal for arguments that mean the same: 1, 1.0 and True differ, as do 0.0 and -0.0."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _key((value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _expression(node: fx.Node) -> Hashable | None:
    """What the node computes, or None where a second call would not be the same."""
    if node.op == "get_attr":
        return ("get_attr", str(node.target))
    if node.op != "call_function" or not ops.is_pure(node):
        return None
    if not hasattr(node.target, "_schema"):
        return (str(node.target), _key(node.args), _key(node.kwargs))
    return (str(node.target), _key(ops.bind(node)))


@register
@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """``f(x) + f(x) -> y + y, y = f(x)``: a call equal to an earlier one, argument by argument, is replaced by it.

    Defaults written out equal defaults left out. Random operators and batch norm in training mode, which updates its
    statistics at every call, stay.
    """

    name = "eliminate-common-subexpressions"
    contract = exact

    def apply(self, edit: Edit) -> None:
        first: dict[Hashable, fx.Node] = {}
        for node in list(edit.graph.nodes):
            expression = _expression(node)
            if expression is None:
                continue
            known = first.setdefault(expression, node)
            if known is not node:
                edit.replace(node, known)
                edit.graph.erase_node(node)
