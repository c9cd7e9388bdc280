"""Training or evaluation: a captured graph holds the mode as constants (``batch_norm(..., training=False)``); these rewrite them.

Batch norm, dropout, instance norm, recurrent layers and ``rrelu`` carry a flag; attention carries its dropout rate, which
is 0 in evaluation. A norm without running statistics uses its batch in both modes and is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import ops

_FLAGS = ("training", "train", "use_input_stats")
_RATE = "dropout_p"  # also the key under which a node remembers its rate while in evaluation


def flag(node: fx.Node) -> str | None:
    """The name of the argument that puts this call into training mode, or None where the mode does not change it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument in node.target._schema.arguments:
        if argument.name in _FLAGS:
            statistics = "running_mean" in (arguments := ops.bind(node))
            return None if statistics and arguments["running_mean"] is None else argument.name
    return None


def is_training(graph: fx.Graph) -> bool:
    """True where a call of the graph is in training mode."""
    return any(_trains(node) for node in graph.nodes)


def set_mode(graph: fx.Graph, training: bool, frozen_statistics: bool = False) -> None:
    """Put every call of ``graph`` into training or evaluation mode; the caller recompiles.

    ``frozen_statistics`` leaves normalisation on its running statistics while dropout trains.
    """
    for node in graph.nodes:
        name = flag(node)
        if name is not None:
            norm = "running_mean" in ops.bind(node)
            _set(node, name, training and not (norm and frozen_statistics))
        elif ops.is_op(node, "attention"):
            rate = ops.bind(node)[_RATE]
            if rate and not training:
                node.meta[_RATE] = rate
            _set(node, _RATE, (rate or node.meta.get(_RATE, 0.0)) if training else 0.0)


def _trains(node: fx.Node) -> bool:
    name = flag(node)
    if name is None and ops.is_op(node, "attention"):
        name = _RATE
    return name is not None and bool(ops.bind(node)[name])


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Write one argument where it differs; arguments left at their defaults are not in the call."""
    arguments = ops.bind(node)
    if arguments[name] == value:
        return
    index = ops.position(node, name)
    if name in node.kwargs or index >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(index, value)
