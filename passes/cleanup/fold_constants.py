"""Evaluate once, at compile time, what depends on no input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.contract import exact
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passing import Pass
from graphopt.registry import register

aten = torch.ops.aten

# These read shape, dtype and device of their tensor, never its values.
_SHAPE_ONLY = {
    getattr(aten, name).default
    for name in ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like")
} | {aten.full_like.default}


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """``f(constants) -> constant``: calls of buffers and literals alone are evaluated and stored as a buffer.

    What stays: anything that reads a trainable parameter, so that ``W * M`` of a pruned and ``fake_quantize(W)`` of a
    quantized layer go on training (``trainable=True``, for deployment, folds parameters too: ``W * M`` becomes one
    parameter that holds the zeros); fake quantization always, because it says where integers begin; random operators;
    results above ``max_bytes`` that are larger than what they are computed from.
    """

    name = "fold-constants"
    contract = exact

    trainable: bool = False
    max_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise PassError(f"fold-constants: max_bytes must be at least 0, not {self.max_bytes}")

    def apply(self, edit: Edit) -> None:
        constant: dict[fx.Node, bool] = {}  # -> does it read a trainable parameter
        for node in edit.graph.nodes:
            if node.op == "get_attr":
                trains = edit.program.tensor(node).requires_grad
                if self.trainable or not trains:
                    constant[node] = trains
            elif self._is_constant(edit, node, constant):
                constant[node] = any(constant.get(source, False) for source in node.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        for node, trains in constant.items():
            if node.op == "get_attr" or all(user in constant for user in node.users):
                continue
            if not isinstance(node.meta["val"], torch.Tensor):
                continue  # a tuple: its getitem is folded
            with torch.no_grad():
                value = _evaluate(edit, node, values)
            assert isinstance(value, torch.Tensor)
            build = edit.build(node)
            edit.replace(node, build.parameter(f"{node.name}_folded", value.clone(), trains))

    def _is_constant(self, edit: Edit, node: fx.Node, constant: dict[fx.Node, bool]) -> bool:
        if node.op != "call_function" or not ops.is_pure(node):
            return False
        known = node.target in _SHAPE_ONLY or all(s in constant for s in node.all_input_nodes)
        if not known or _is_fake_quantize(node) or _has_symbolic_size(node):
            return False
        size = _bytes(node)
        if size > self.max_bytes and size > sum(_bytes(s) for s in node.all_input_nodes):
            edit.decline(
                node, f"its value takes {size} bytes, more than max_bytes={self.max_bytes}"
            )
            return False
        return True


def _is_fake_quantize(node: fx.Node) -> bool:
    return "fake_quantize" in str(node.target)


def _leaves(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _has_symbolic_size(node: fx.Node) -> bool:
    leaves = _leaves(node)
    return not leaves or any(isinstance(s, torch.SymInt) for v in leaves for s in v.shape)


def _bytes(node: fx.Node) -> int:
    """Bytes of the node's value; 0 for sizes that are not known yet."""
    if _has_symbolic_size(node):
        return 0
    return sum(v.numel() * v.element_size() for v in _leaves(node))


def _evaluate(edit: Edit, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The node's value; every constant is computed once."""
    if node.op == "get_attr":
        return edit.program.tensor(node)
    if node not in values:
        args, kwargs = node.args, node.kwargs
        if node.target in _SHAPE_ONLY:
            like = args[0].meta["val"]  # type: ignore[union-attr]
            args = (torch.empty(like.shape, dtype=like.dtype), *args[1:])
        known = functools.partial(_evaluate, edit, values=values)
        assert callable(node.target)
        values[node] = node.target(*fx.map_arg(args, known), **fx.map_arg(kwargs, known))
    return values[node]
