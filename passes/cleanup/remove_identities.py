"""Remove operators that return their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.contract import Contract, exact, within
from graphopt.edit import Edit
from graphopt.passing import Pass
from graphopt.registry import register
from graphopt.verify import same_shape

aten = torch.ops.aten
Arguments = dict[str, Any]

# A value of these is never negative, so that a ReLU after them returns its input.
_NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "abs", "exp")
_UNTABLED = (aten.to.dtype, aten._to_copy.default, aten.lift_fresh_copy.default)


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _always(node: fx.Node, arguments: Arguments) -> bool:
    return True


def _with(argument: str, *neutral: Any) -> Callable[[fx.Node, Arguments], bool]:
    """The argument is one of these literals."""
    return lambda node, arguments: (
        not isinstance(arguments[argument], fx.Node) and arguments[argument] in neutral
    )


def _keeps_order(node: fx.Node, arguments: Arguments) -> bool:
    rank = len(node.meta["val"].shape)
    return [axis % rank for axis in arguments["dims"]] == list(range(rank))


def _keeps_axes(node: fx.Node, arguments: Arguments) -> bool:
    rank = max(1, len(node.meta["val"].shape))
    return bool(arguments["dim0"] % rank == arguments["dim1"] % rank)


def _pads_nothing(node: fx.Node, arguments: Arguments) -> bool:
    return all(not isinstance(amount, fx.Node) and amount == 0 for amount in arguments["pad"])


def _single_window(node: fx.Node, arguments: Arguments) -> bool:
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0}
    windows = all(set(arguments[name]) <= {value} for name, value in neutral.items())
    return windows and arguments.get("divisor_override") in (None, 1)


def _after_not_negative(node: fx.Node, arguments: Arguments) -> bool:
    return ops.is_op(arguments["self"], *_NOT_NEGATIVE)


def _after_relu6(node: fx.Node, arguments: Arguments) -> bool:
    return ops.is_op(arguments["self"], "relu6", "hardsigmoid", "sigmoid")


def _is_dense_copy(node: fx.Node, arguments: Arguments) -> bool:
    """The input's strides are the output's already."""
    source = _value(arguments["self"])
    return source is not None and [str(s) for s in source.stride()] == [
        str(s) for s in node.meta["val"].stride()
    ]


# Operator -> when a call that keeps shape and dtype returns its first argument.
_IDENTITIES: dict[str, Callable[[fx.Node, Arguments], bool]] = {
    "add": _with("other", 0),
    "sub": _with("other", 0),
    "mul": _with("other", 1),
    "div": _with("other", 1),
    "pow": _with("exponent", 1),
    "relu": _after_not_negative,
    "relu6": _after_relu6,
    "dropout": lambda node, arguments: arguments["train"] is False or arguments["p"] == 0,
    "alias": _always,
    "detach": _always,
    "reshape": _always,
    "view": _always,
    "flatten": _always,
    "unflatten": _always,
    "squeeze": _always,
    "expand": _always,
    "slice": lambda node, arguments: arguments["step"] == 1,
    "contiguous": _is_dense_copy,
    "clone": _is_dense_copy,
    "permute": _keeps_order,
    "transpose": _keeps_axes,
    "pad": _pads_nothing,
    "max_pool2d": _single_window,
    "avg_pool2d": _single_window,
    "adaptive_avg_pool2d": _always,
    "adaptive_max_pool2d": _always,
    "upsample_nearest2d": _always,
    "pixel_shuffle": _with("upscale_factor", 1),
    "pixel_unshuffle": _with("downscale_factor", 1),
    "channel_shuffle": _with("groups", 1),
    "flip": lambda node, arguments: not arguments["dims"],
    "concat": lambda node, arguments: len(arguments["tensors"]) == 1,
}
_LAYOUT = ("contiguous", "clone")


def _order(node: Any) -> list[int] | None:
    """The axes of a permute or transpose, ``output axis i = input axis order[i]``."""
    if not ops.is_op(node, "permute", "transpose", "t"):
        return None
    rank = len(node.meta["val"].shape)
    order, arguments = list(range(rank)), ops.bind(node)
    if ops.is_op(node, "permute"):
        return [axis % rank for axis in arguments["dims"]]
    if ops.is_op(node, "t"):
        return order[::-1]
    first, second = arguments["dim0"] % max(1, rank), arguments["dim1"] % max(1, rank)
    if rank:
        order[first], order[second] = second, first
    return order


def _source(node: fx.Node) -> Any:
    first = next(iter(ops.bind(node).values()), None)
    return first[0] if isinstance(first, Sequence) and first else first


@register
@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """``x + 0, x * 1, relu(relu(x)), dropout(x) in evaluation, reshape(x, x.shape), permute(permute(x)) -> x``.

    Also aliases, copies that change no stride, padding by 0, a slice of everything, windows of one element,
    concatenations of one value, and casts to the same dtype; two permutations in a row become one; ``view`` becomes ``reshape``,
    which takes any strides. The sign of a zero is not kept by ``x + 0``. Dropout in training mode stays.

    ``layout=True`` removes ``contiguous()`` and ``clone()`` that do change strides: a compiled program chooses its own
    layout. PyTorch then adds in another order, and the contract is ``within(1e-5)``.
    """

    name = "remove-identities"
    contract = exact

    layout: bool = False

    def promised(self) -> Contract:
        return within(1e-5) if self.layout else exact

    def apply(self, edit: Edit) -> None:
        for node in edit.nodes():
            if self._is_identity(node):
                edit.replace(node, _source(node))
            elif ops.is_op(node, "dropout"):
                edit.decline(node, "dropout is in training mode; call program.eval() first")
            elif ops.is_op(node, "view"):
                arguments = ops.bind(node)
                build = edit.build(node)
                edit.replace(node, build.reshape(arguments["self"], arguments["size"]))
            elif _order(node) is not None:
                _merge_permutations(edit, node)

    def _is_identity(self, node: fx.Node) -> bool:
        op = ops.info(node)
        if op is None:
            return node.target in _UNTABLED and _keeps_value(node)
        if op.name not in _IDENTITIES or not _keeps_value(node):
            return False
        if op.name in _LAYOUT and self.layout:
            return True
        return _IDENTITIES[op.name](node, ops.bind(node))


def _keeps_value(node: fx.Node) -> bool:
    """Shape, dtype and device are the first argument's."""
    before, after = _value(_source(node)), _value(node)
    if before is None or after is None:
        return False
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and same_shape(before.shape, after.shape)
    )


def _merge_permutations(edit: Edit, node: fx.Node) -> None:
    """``permute(permute(x, p), q) -> permute(x, p[q])``, or x where they cancel."""
    outer, source = _order(node), _source(node)
    inner = _order(source)
    if inner is None or outer is None:
        return
    order = [inner[axis] for axis in outer]
    x = _source(source)
    if order == list(range(len(order))):
        edit.replace(node, x)
    else:
        edit.replace(node, edit.build(node, [source, node]).permute(x, order))
