"""Constant subgraphs: what a program computes from its parameters alone (``W * M``, ``codebook[indices]``)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.program import Program


class Constants:
    """Evaluates nodes that depend on parameters only; every result is kept."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._values: dict[fx.Node, Tensor | None] = {}

    def value(self, node: fx.Node) -> Tensor | None:
        """The tensor that ``node`` always holds, or None where it depends on an input."""
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def source(self, node: fx.Node) -> str | None:
        """The path of the first parameter that ``node`` is computed from."""
        while node.op != "get_attr":
            if not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        return str(node.target)

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            return self._program.tensor(node).detach()
        if node.op != "call_function" or node.is_impure() or _is_random(node):
            return None
        if any(self.value(argument) is None for argument in node.all_input_nodes):
            return None
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result.detach() if isinstance(result, Tensor) else None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
