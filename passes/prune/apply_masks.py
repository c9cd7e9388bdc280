"""Masks become zeros of the weights: ``mul(W, M) -> W'``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt import ops
from graphopt.contract import Contract, exact
from graphopt.edit import Edit
from graphopt.passing import Pass
from graphopt.registry import register


@register
@dataclass(frozen=True)
class ApplyMasks(Pass):
    """``W * M -> W'``: what is pruned is zero in the parameter itself, which keeps its name; the masks are gone.

    For deployment: training afterwards fills the zeros again. Declines a weight that something else reads unmasked or
    through another mask.
    """

    name: ClassVar[str] = "apply-masks"
    contract: ClassVar[Contract] = exact

    def apply(self, edit: Edit) -> None:
        for product in list(edit.nodes("mul")):
            pair = ops.masked(product)
            if pair is None:
                continue
            weight, mask = pair
            readers = _readers(edit, weight)
            pairs = [ops.masked(node) for node in readers]
            if any(found is None or found[1].target != mask.target for found in pairs):
                edit.decline(product, f"parameter {weight.target} is also read without this mask")
                continue
            edit.set_tensor(weight, edit.program.tensor(weight) * edit.program.tensor(mask))
            for node in readers:
                edit.replace(node, weight)


def _readers(edit: Edit, weight: fx.Node) -> list[fx.Node]:
    """What reads the tensor of a ``get_attr`` node, under this name or another."""
    tensor = edit.program.tensor(weight)
    nodes = [n for n in edit.graph.nodes if n.op == "get_attr" and edit.program.tensor(n) is tensor]
    return [user for node in nodes for user in node.users]
