"""Operators that move or select elements and never compute: they run on integers as they are."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt import ops

aten = torch.ops.aten

# The value itself, or a copy of it: no node at the integer level.
_IDENTITIES = ("contiguous", "clone", "alias", "detach")


def source(node: fx.Node) -> fx.Node | None:
    """The one node whose elements ``node`` moves, or None where it is no copy."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _as_node(node.args[0])
    if is_identity(node):
        return _as_node(node.args[0])
    op = ops.info(node)
    if op is None or op.kind != "shape" or not op.same_qparams:
        return None
    return _as_node(ops.bind(node)[op.inputs[0]])


def is_identity(node: fx.Node) -> bool:
    """True where the result holds the input's elements in the input's order and shape."""
    if ops.is_op(node, *_IDENTITIES):
        return True
    if ops.is_op(node, "dropout"):
        return ops.bind(node)["train"] is False
    if ops.is_op(node, "adaptive_avg_pool2d"):
        arguments = ops.bind(node)
        shape = arguments["self"].meta["val"].shape
        return bool(list(shape[-2:]) == list(arguments["output_size"]))
    return False


def call(node: fx.Node, integer: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of the same copy of ``integer``.

    A view becomes a reshape: integer results are contiguous where a float one may have kept other strides.
    """
    target = aten.reshape.default if ops.is_op(node, "view") else node.target
    return target, (integer, *node.args[1:]), dict(node.kwargs)


def _as_node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def hoist_sizes(graph: fx.Graph) -> None:
    """Let ``sym_size`` read the graph's inputs: a float value read only for its size need not be computed."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    homes: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                homes.setdefault(str(size), (node, axis))
    for node in graph.nodes:
        if node.target is aten.sym_size.int and str(node.meta["val"]) in homes:
            node.args = homes[str(node.meta["val"])]
