"""Pooling in integers: max pools as they are, averages as one sum and one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import Decline
from graphopt.integer.arithmetic import QParams

integer_ops = torch.ops.graphopt

AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d", "mean")
_UNQUANTIZED = "its result is not fake-quantized"


@dataclass(frozen=True)
class Call:
    """A ``graphopt::`` overload and its arguments after the tensor."""

    target: Any
    arguments: tuple[Any, ...]


def maximum(node: fx.Node) -> Call:
    """``max_pool2d``: the same windows over integers."""
    arguments = ops.bind(node)
    _check_batched(node)
    kernel = _pair(arguments["kernel_size"])
    windows = (
        kernel,
        _pair(arguments["stride"]) if arguments["stride"] else kernel,
        _pair(arguments["padding"]),
        _pair(arguments["dilation"]),
    )
    return Call(integer_ops.max_pool2d.default, (*windows, arguments["ceil_mode"]))


def average(node: fx.Node, x: QParams, y: QParams | None) -> Call:
    """Average pools and means over the map; the multiplier is ``s_x / s_y``, still to be divided by the count.

    Without ``y`` the result stays float: the multiplier is ``s_x``, and the average must be over the whole map. Declines
    an adaptive pool whose windows differ in size, and a mean over anything but height and width.
    """
    _check_batched(node)
    arguments = ops.bind(node)
    if y is None:
        return _in_float(node, x)
    ending = (x.scale / y.scale, x.zero_point, y.zero_point, y.qmin, y.qmax)
    if ops.is_op(node, "mean"):
        _check_spatial(node)
        return Call(integer_ops.global_avg_pool.default, (*ending, arguments["keepdim"]))
    if ops.is_op(node, "adaptive_avg_pool2d"):
        return _adaptive(node, ending)
    kernel = _pair(arguments["kernel_size"])
    windows = (
        kernel,
        _pair(arguments["stride"]) if arguments["stride"] else kernel,
        _pair(arguments["padding"]),
        arguments["ceil_mode"],
        arguments["count_include_pad"],
        arguments["divisor_override"] or 0,
    )
    return Call(integer_ops.avg_pool2d.default, (*windows, *ending))


def _in_float(node: fx.Node, x: QParams) -> Call:
    arguments = ops.bind(node)
    if ops.is_op(node, "mean"):
        _check_spatial(node)
    elif not ops.is_op(node, "adaptive_avg_pool2d") or list(arguments["output_size"]) != [1, 1]:
        raise Decline(_UNQUANTIZED)
    ending = (x.scale, x.zero_point, arguments.get("keepdim", True))
    return Call(integer_ops.global_avg_pool_dequantize.default, ending)


def _adaptive(node: fx.Node, ending: tuple[Any, ...]) -> Call:
    arguments = ops.bind(node)
    size = list(arguments["self"].meta["val"].shape[2:])
    windows = list(arguments["output_size"])
    if windows == [1, 1]:
        return Call(integer_ops.global_avg_pool.default, (*ending, True))
    if any(have % want for have, want in zip(size, windows, strict=True)):
        raise Decline(f"an adaptive pool from {size} to {windows} has windows of unequal size")
    kernel = [have // want for have, want in zip(size, windows, strict=True)]
    return Call(integer_ops.avg_pool2d.default, (kernel, kernel, [0, 0], False, True, 0, *ending))


def is_batched(node: fx.Node) -> bool:
    """True where a pool's input is ``[N, C, H, W]``."""
    return bool(ops.bind(node)["self"].meta["val"].dim() == 4)


def _check_spatial(node: fx.Node) -> None:
    if sorted(dim % 4 for dim in ops.bind(node)["dim"] or ()) != [2, 3]:
        raise Decline("only a mean over height and width has an integer form")


def _check_batched(node: fx.Node) -> None:
    if not is_batched(node):
        raise Decline("its input is not [N, C, H, W]")


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
