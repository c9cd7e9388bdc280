"""Remove what no output reads: calls, parameters and buffers, and second reads of one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt import ops
from graphopt.contract import exact
from graphopt.edit import Edit
from graphopt.passing import Pass
from graphopt.registry import register


@register
@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """``y = f(x); z = g(x); return y`` -> ``y = f(x); return y``: nodes that no output depends on go.

    Two ``get_attr`` nodes of one parameter become one, so that "read once" can be told from ``node.users``. Tensors
    that no node reads leave the module. Operators with side effects stay; a random one whose result is unread has none.
    """

    name = "remove-dead-code"
    contract = exact

    def apply(self, edit: Edit) -> None:
        first: dict[str, fx.Node] = {}
        for node in list(edit.graph.nodes):
            if node.op != "get_attr":
                continue
            known = first.setdefault(str(node.target), node)
            if known is not node:
                node.replace_all_uses_with(known)
                edit.erase(node)
        for node in reversed(list(edit.graph.nodes)):
            if not node.users and not ops.has_effect(node):
                edit.erase(node)
