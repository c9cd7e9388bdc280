"""Reshapes, transpositions and slices as strides: what a kernel can read or write in place instead of a copy."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.lower.fusing import sole_user
from graphopt.backends.lower.step import value_of

_COPIES = ("contiguous", "clone", "alias", "detach")
_RESHAPES = ("reshape", "view", "flatten")
_TURNS = ("transpose", "permute")
_VIEWS = (
    *_RESHAPES,
    *_TURNS,
    "unflatten",
    "squeeze",
    "unsqueeze",
    "t",
    "expand",
    "slice",
    "select",
    "split",
    "chunk",
)
_UNBIND = torch.ops.aten.unbind.int


@dataclass(frozen=True)
class View:
    """A node's value as elements of ``base``'s memory, which is contiguous."""

    base: fx.Node
    strides: tuple[int, ...]
    offset: int = 0


def whole(node: fx.Node) -> View:
    """The value itself."""
    return View(node, contiguous_strides(shape_hints(node)))


def shape_hints(node: fx.Node) -> tuple[int, ...]:
    """The sizes, a dynamic one by its example."""
    return tuple(ops._hint(size) for size in value_of(node).shape)


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor; the first size does not matter."""
    return tuple(math.prod(sizes[index + 1 :]) for index in range(len(sizes)))


def view_of(node: fx.Node) -> View:
    """``node`` as a view of the value furthest back that it can be one of.

    Strides do not depend on a dynamic batch: it is the first axis of every contiguous value. A product whose kernel may
    write a view of its own result ends the search there.
    """
    best, chain, current = whole(node), [], node
    while _is_view(current):
        chain.append(current)
        current = current.all_input_nodes[0]
        if not isinstance(current.meta.get("val"), torch.Tensor):
            continue
        op = ops.info(current)
        ends = op is not None and op.kind == "matmul" and bool(written_view(current)[0])
        traced = None if ends else _trace(current, chain)
        if traced is None:
            return best
        best = View(current, *traced)
    return best


def _is_view(node: fx.Node) -> bool:
    if node.target in (operator.getitem, _UNBIND):
        return len(node.all_input_nodes) == 1
    return ops.is_op(node, *_COPIES, *_VIEWS)


def _trace(base: fx.Node, chain: list[fx.Node]) -> tuple[tuple[int, ...], int] | None:
    """Strides and offset of ``chain[0]`` in the memory of ``base``; None where a reshape must copy."""
    start = torch.empty(shape_hints(base), device="meta")
    values: dict[fx.Node, Any] = {base: start}
    for node in reversed(chain):
        source = node.all_input_nodes[0]
        if ops.is_op(node, *_COPIES):
            values[node] = values[source]
            continue

        def concrete(n: fx.Node) -> Any:
            return values[n] if n in values else ops._hint(n.meta["val"])

        args = fx.map_arg(node.args, concrete)
        kwargs = fx.map_arg(node.kwargs, concrete)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    end = values[chain[0]]
    if end.untyped_storage()._cdata != start.untyped_storage()._cdata:
        return None
    return tuple(end.stride()), int(end.storage_offset())


def written_view(node: fx.Node) -> tuple[list[fx.Node], tuple[int, ...]]:
    """The transposition and reshapes that alone read ``node``, and the strides of node's elements in their result."""
    sizes = shape_hints(node)
    turn = sole_user(node)
    if turn is None or not ops.is_op(turn, *_TURNS):
        return [], contiguous_strides(sizes)
    axes = list(range(len(sizes)))
    order = _order(turn, axes)
    if order[-1] != axes[-1]:
        return [], contiguous_strides(sizes)
    strides = contiguous_strides(tuple(sizes[axis] for axis in order))
    nodes, user = [turn], sole_user(turn)
    while user is not None and ops.is_op(user, *_COPIES, *_RESHAPES):
        nodes.append(user)
        user = sole_user(user)
    return nodes, tuple(strides[order.index(axis)] for axis in axes)


def _order(turn: fx.Node, axes: list[int]) -> list[int]:
    a = ops.bind(turn)
    if ops.is_op(turn, "permute"):
        return [axis % len(axes) for axis in a["dims"]]
    order = list(axes)
    first, second = a["dim0"] % len(axes), a["dim1"] % len(axes)
    order[first], order[second] = order[second], order[first]
    return order
