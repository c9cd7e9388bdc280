"""Steps on float16 tensors: a float32 operator whose casts, before and behind it, its kernel takes in.

``float16(f(float32(x)))`` is one kernel that reads and writes float16 and computes in float32, as ``CastToFloat16`` means it. Only
kernels of this folder can: on a CPU the casts stay what they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from graphopt.backends.cuda.autocast import half_behind, is_cast
from graphopt.backends.lower.convolution import BatchNormStep, ConvolutionStep, unpadded
from graphopt.backends.lower.elementwise import ConcatStep, ConvertStep
from graphopt.backends.lower.fusing import sole_user
from graphopt.backends.lower.plan import Selector
from graphopt.backends.lower.step import Step, rank, value_of

_FLOATS = (torch.float16, torch.float32)


def narrowing(select: Selector) -> Selector:
    """The selector, its float steps on float16 where casts say so."""

    def run(node: fx.Node) -> Step | None:
        step = select(node)
        if isinstance(step, ConvolutionStep):
            _narrow_layer(step)
        elif step is not None:
            _narrow(step)
        return step

    return run


def select_cast(node: fx.Node) -> Step | None:
    """A cast between float16 and float32 of a map or of rows, which may change its layout on the way."""
    if not is_cast(node) or rank(node) not in (2, 4):
        return None
    x = node.all_input_nodes[0]
    dtypes = (value_of(x).dtype, value_of(node).dtype)
    if x.op == "get_attr" or any(dtype not in _FLOATS for dtype in dtypes):
        return None
    return ConvertStep([node], x)


def _rounding(step: Step) -> fx.Node | None:
    """The cast to float16 that alone reads what a step makes."""
    user = sole_user(step.output)
    if not is_cast(user) or user is None or value_of(user).dtype != torch.float16:
        return None
    return user if value_of(step.output).dtype == torch.float32 else None


def _round(step: Step, cast: fx.Node) -> None:
    step.nodes.append(cast)
    step.output = cast


def _narrow(step: Step) -> None:
    halves, cast = [half_behind(value) for value in step.inputs], _rounding(step)
    if isinstance(step, ConcatStep) and (cast is None or None in halves):
        return  # it copies
    step.inputs = [half or value for half, value in zip(halves, step.inputs, strict=True)]
    if cast is not None:
        _round(step, cast)


def _narrow_layer(step: ConvolutionStep) -> None:
    """Activations and weights are multiplied in one type, and a residual has the type of the result."""
    x, cast = half_behind(step.inputs[0]), _rounding(step)
    if x is None or not (
        isinstance(step, BatchNormStep) or half_behind(step.constants.weight) is not None
    ):
        return
    if rank(x) == 4:
        x, (top, left) = unpadded(x)
        padding = step.window.padding
        step.window = replace(step.window, padding=(padding[0] + top, padding[1] + left))
    residual = half_behind(step.inputs[1]) if len(step.inputs) > 1 else None
    step.inputs[0] = x
    if cast is not None and (len(step.inputs) == 1 or residual is not None):
        if residual is not None:
            step.inputs[1] = residual
        _round(step, cast)
