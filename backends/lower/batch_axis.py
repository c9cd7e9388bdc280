"""Where the images of a batch lie in a tensor, and a call of an operator as a rule about batches sees it.

A tensor *carries the batch* where one axis is the batch's, possibly with rows of each image beneath it: of size
``images * rows``, image ``i`` its rows ``[i * rows, (i + 1) * rows)`` and a function of image ``i`` alone. Other tensors are
the same for every image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.errors import Decline


@dataclass(frozen=True)
class BatchAxis:
    """The axis of the batch, and how many of its rows are one image's."""

    index: int
    rows: int = 1


Axis = BatchAxis | None  # None: the same for every image


def sizes_of(value: Any) -> list[int]:
    """A tensor's sizes, a dynamic one by its example."""
    return [ops._hint(size) for size in value.shape]


class Call:
    """One call under a rule: its arguments by schema name, where their batches lie, and the batch's example size.

    A rule sets those ``arguments`` (and ``target``) that are to be others for a batch of one.
    """

    def __init__(self, node: fx.Node, axes: Mapping[fx.Node, Axis], batch: Any) -> None:
        self.node = node
        self.target: Any = node.target
        self.arguments = ops.bind(node)
        self.batch = ops._hint(batch)
        self.is_dynamic = depends_on_batch(batch)
        self._axes = axes

    def begins_with_batch(self) -> bool:
        """True where the first size of the result is the batch's, or looks so where the batch is fixed."""
        value = first_tensor(self.node)
        if value is None or not value.dim():
            return False
        size = value.shape[0]
        return depends_on_batch(size) if self.is_dynamic else size == self.batch

    def is_changed(self) -> bool:
        """True where a rule has changed the call."""
        return self.target != self.node.target or self.arguments != ops.bind(self.node)

    def written(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a call takes them, by position and by name."""
        schema = self.target._schema.arguments
        given = [a for a in schema if a.name in self.arguments]
        positional = tuple(self.arguments[a.name] for a in given if not a.kwarg_only)
        return positional, {a.name: self.arguments[a.name] for a in given if a.kwarg_only}

    def tensors(self) -> list[fx.Node]:
        """The tensors that the call reads."""
        return [node for node in self.node.all_input_nodes if first_tensor(node) is not None]

    def axis(self, node: fx.Node) -> Axis:
        return self._axes[node]

    def sizes(self, node: fx.Node | None = None) -> list[int]:
        """The sizes of an argument, by default of the result (of the first, where there are several)."""
        return sizes_of(first_tensor(self.node if node is None else node))

    def data(self) -> tuple[fx.Node, BatchAxis]:
        """The first tensor, which must be the only one that carries the batch."""
        first, *others = self.tensors()
        axis = self.axis(first)
        if axis is None or any(self.axis(other) is not None for other in others):
            raise Decline("the weights of a layer depend on the images")
        return first, axis


def first_tensor(node: fx.Node) -> torch.Tensor | None:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)


def depends_on_batch(value: Any) -> bool:
    """True for a size that is another for another batch."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
