"""The proof that a program treats every image of a batch alone: from operator to operator, where each tensor carries it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.backends.lower.batch_axis import (
    Axis,
    BatchAxis,
    Call,
    depends_on_batch,
    first_tensor,
)
from graphopt.backends.lower.batch_rules import MADE, SIZED, name_of, rule_of
from graphopt.errors import Decline
from graphopt.program import Program


def batch_of(program: Program) -> Any:
    """The size of dimension 0 of the first input; a symbolic one where it is dynamic."""
    sizes = list(program.inputs[0].meta["val"].shape) if program.inputs else []
    return sizes[0] if sizes else 1


def declined(node: fx.Node, reason: str) -> Decline:
    """Why a batch cannot be taken apart."""
    return Decline(f"node {node.name!r} ({node.target}) may mix images: {reason}")


def batch_axes(program: Program) -> tuple[dict[fx.Node, Axis], dict[fx.Node, Call]]:
    """Where every tensor of a program carries the batch, and the calls that are others for a batch of one.

    Raises Decline, naming the node, where a rule does, or an input or output does not begin with the batch.
    """
    batch, axes, calls = batch_of(program), dict[fx.Node, Axis](), dict[fx.Node, Call]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            sizes = node.meta["val"].shape
            if not len(sizes) or str(sizes[0]) != str(batch):
                raise Decline(f"input {node.name!r} does not begin with the batch")
            axes[node] = BatchAxis(0)
        elif node.op == "get_attr":
            axes[node] = None
        elif node.op == "output":
            _check_outputs(node, axes)
        elif first_tensor(node) is not None:
            try:
                axes[node], call = _call_axis(node, axes, batch)
            except Decline as reason:
                raise declined(node, str(reason)) from None
            if call is not None and call.is_changed():
                calls[node] = call
    return axes, calls


def _check_outputs(output: fx.Node, axes: Mapping[fx.Node, Axis]) -> None:
    for node in output.all_input_nodes:
        axis = axes.get(node)
        if axis is None or axis.index != 0:
            raise Decline(f"output {node.name!r} does not begin with the batch")


def _call_axis(node: fx.Node, axes: Mapping[fx.Node, Axis], batch: Any) -> tuple[Axis, Call | None]:
    if node.target is operator.getitem:
        return axes[node.all_input_nodes[0]], None
    name = name_of(node)
    sized = any(depends_on_batch(source.meta["val"]) for source in node.all_input_nodes)
    if sized and name not in SIZED:
        raise Decline("it computes with the number of images")
    carried = any(axes.get(source) is not None for source in node.all_input_nodes)
    if not carried and name not in MADE:
        return None, None
    if not ops.is_pure(node):
        raise Decline("it is random or has an effect")
    rule = rule_of(node)
    if rule is None:
        raise Decline("nothing is known of what it does to a batch")
    call = Call(node, axes, batch)
    axis = rule(call)
    _check_size(node, axis, call)
    return axis, call


def _check_size(node: fx.Node, axis: Axis, call: Call) -> None:
    """Where the batch is dynamic, its size stands at its axis and nowhere else."""
    for leaf in pytree.tree_leaves(node.meta["val"]):
        if not isinstance(leaf, torch.Tensor):
            continue
        for index, size in enumerate(leaf.shape):
            if depends_on_batch(size) != (
                call.is_dynamic and axis is not None and index == axis.index
            ):
                raise Decline("its sizes depend on the number of images")
