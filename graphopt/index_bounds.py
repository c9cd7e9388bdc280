"""Which inputs of a program are indices of an embedding, and of how many rows: compiled code reads a row unchecked."""

from __future__ import annotations

from torch import fx

from graphopt import ops
from graphopt.program import Program

_CASTS = ("to", "_to_copy", "clone", "contiguous")


def index_bounds(program: Program) -> dict[str, int]:
    """Inputs whose values become indices as they are, by name, with the rows of the smallest table that they index.

    Indices that the network computes are not among them.
    """
    bounds = {node.name: _rows(node) for node in program.inputs}
    return {name: min(rows) for name, rows in bounds.items() if rows}


def _rows(node: fx.Node) -> list[int]:
    """The rows of the tables that the elements of ``node`` index."""
    found = []
    for user in node.users:
        if ops.is_op(user, "embedding"):
            arguments = ops.bind(user)
            if arguments["indices"] is node:
                found.append(int(arguments["weight"].meta["val"].shape[0]))
        elif _keeps_values(user):
            found.extend(_rows(user))
    return found


def _keeps_values(node: fx.Node) -> bool:
    """True for calls whose every element is one of an integer tensor's."""
    op = ops.info(node)
    if op is not None and op.kind == "shape":
        return True
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else schema.name.removeprefix("aten::")
    return name in _CASTS and not node.meta["val"].is_floating_point()
