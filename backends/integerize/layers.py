"""Convolutions and linear layers: int8 weights, int32 biases at ``s_x * s_w``, float32 multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.backends.integerize.constants import Constants
from graphopt.backends.integerize.quantizers import Weight
from graphopt.backends.integerize.quantizers import weight as read_weight
from graphopt.errors import Decline, IntegerizeError
from graphopt.integer.arithmetic import INT32_MAX, MIN_SCALE, QParams, check_accumulator

CONVOLUTIONS = ("conv1d", "conv1d_same", "conv2d", "conv2d_same")
NAMES = (*CONVOLUTIONS, "linear")
_BIAS_ROUNDING = 0.5  # output steps; with the output's own rounding, results stay within one step of the simulation


@dataclass(frozen=True)
class Window:
    """Geometry of a 2-D convolution; ``padding`` is (top, left, bottom, right)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Layer:
    """A layer in integers: ``acc = sum (x - zp) * weight.q + bias``; ``window`` is None for a linear layer.

    ``bias_rounding`` is what rounding took from the bias, float64, in steps of ``s_x * s_w``. ``rank`` is that of the
    float layer's activations: a 1-D convolution runs as a 2-D one of height 1.
    """

    x: fx.Node
    weight: Weight
    bias: Tensor
    bias_rounding: Tensor
    window: Window | None
    rank: int

    def multiplier(self, x: QParams, y: QParams | None) -> Tensor:
        """``s_x * s_w / s_y`` for each output channel (``s_y`` is 1 where the result stays float), as float32."""
        product = self.weight.scale.to(torch.float64) * x.scale
        result = (product / (y.scale if y is not None else 1.0)).to(torch.float32)
        if not bool((torch.isfinite(result) & (result >= MIN_SCALE)).all()):
            raise Decline("its multiplier s_x * s_w / s_y is no normal float32 number")
        lost = self.bias_rounding * result
        if y is not None and bool((lost > _BIAS_ROUNDING).any()):
            channel = int(lost.argmax())
            raise Decline(
                f"the bias of output channel {channel} would lose {float(lost[channel]):.2g} output steps, because the "
                "input's scale is coarse beside the output's"
            )
        return result


def read(node: fx.Node, x: QParams, constants: Constants) -> Layer:
    """The integer form of a float layer whose input has the parameters ``x``.

    Declines weights without an int8 form, biases that are no constants, and accumulators that could leave int32.
    """
    arguments = ops.bind(node)
    weight = read_weight(arguments["weight"], constants)
    window = None if ops.is_op(node, "linear") else _window(node, arguments, weight.q)
    rank = node.meta["val"].dim()
    if window is not None and rank != weight.q.dim():
        raise Decline("its input has no batch dimension")
    if weight.q.dim() == 3:
        weight = Weight(weight.q.unsqueeze(2), weight.scale, weight.path)
    bias, bias_rounding = _bias(arguments["bias"], weight, x, constants)
    try:
        check_accumulator(weight.q, bias)
    except IntegerizeError as error:
        raise Decline(str(error)) from error
    return Layer(arguments["input"], weight, bias, bias_rounding, window, rank)


def _bias(
    node: fx.Node | None, weight: Weight, x: QParams, constants: Constants
) -> tuple[Tensor, Tensor]:
    """``rint(b / (s_x * s_w))`` as int32, and how much that rounding took."""
    if node is None:
        zero = torch.zeros(weight.q.shape[0], dtype=torch.int32)
        return zero, zero.double()
    real = constants.value(node)
    if real is None:
        raise Decline("its bias is computed from an input")
    exact = real.to(torch.float64) / (weight.scale.to(torch.float64) * x.scale)
    steps = torch.round(exact)
    fits = torch.isfinite(steps) & (steps.abs() <= INT32_MAX)
    if not bool(fits.all()):
        channel = int((~fits).nonzero()[0])
        raise Decline(f"the bias of output channel {channel} leaves int32 in steps of s_x * s_w")
    return steps.to(torch.int32), (exact - steps).abs()


def _window(node: fx.Node, arguments: dict[str, Any], weight: Tensor) -> Window:
    dims = weight.dim() - 2
    stride = _spread(arguments["stride"], dims)
    dilation = _spread(arguments["dilation"], dims)
    padding = arguments["padding"]
    if isinstance(padding, str):
        pairs = [
            _same(size, step) if padding == "same" else (0, 0)
            for size, step in zip(weight.shape[2:], dilation, strict=True)
        ]
    else:
        pairs = [(size, size) for size in _spread(padding, dims)]
    if dims == 1:
        stride, dilation, pairs = [1, *stride], [1, *dilation], [(0, 0), *pairs]
    (top, bottom), (left, right) = pairs
    return Window(
        (stride[0], stride[1]),
        (top, left, bottom, right),
        (dilation[0], dilation[1]),
        int(arguments["groups"]),
    )


def _spread(value: int | Sequence[int], dims: int) -> list[int]:
    """An ATen ``int[2]`` argument, whose single number stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _same(kernel: int, dilation: int) -> tuple[int, int]:
    """torch's ``padding="same"``: the odd element goes to the end."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
