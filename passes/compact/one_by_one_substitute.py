"""1 x 1 filters in place of 3 x 3 ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from graphopt.edit import Build
from graphopt.ops import bind
from graphopt.passes.compact.substitute import (
    Cost,
    Fitted,
    Layer,
    Maker,
    Substitute,
    macs,
    outputs_of,
)
from graphopt.passes.compact.two_stage import least_squares, relative_error
from graphopt.registry import register

_RIDGE = 1e-3  # of a channel's mean square, towards the sum of the taps


@register
@dataclass(frozen=True)
class OneByOneSubstitute(Substitute):
    """Replace 3 x 3 convolutions by 1 x 1 ones, a ninth of the weights (SqueezeNet's strategy 1: Iandola et al. 2016).

    ``V, b = argmin sum over positions of ||W * x - V x_middle - b||^2``: what the neighbours say of the middle pixel goes
    into its weights. A stride stays where it is, and padding that is not 1 becomes a crop. Give ``layers`` or ``share``:
    a network of 1 x 1 filters alone sees single pixels.
    Declines other kernels, groups, weights that are shared, computed, masked or fake-quantized.
    """

    name: ClassVar[str] = "one-by-one-substitute"

    share: float = 0.5

    def unfit(self, layer: Layer) -> str | None:
        rows, columns = layer.weight.shape[2:]
        return None if rows == columns == 3 else f"its kernel is {rows} x {columns}, not 3 x 3"

    def cost(self, layer: Layer) -> Cost:
        outputs, inputs = layer.weight.shape[:2]
        count, _, *sizes = layer.made
        return Cost(outputs * inputs + outputs, macs((count, *sizes), (outputs, inputs)))

    def fit(self, layer: Layer, inputs: Tensor) -> Fitted:
        outputs, fixed = outputs_of(layer, inputs), self.fixed(layer)
        held = max(1, len(inputs) // 4)
        middle, begun = inputs[:, :, 1, 1], layer.weight.sum((2, 3))
        ((weight, bias),) = least_squares(middle[held:], outputs[held:], begun, fixed, (_RIDGE,))
        error = relative_error(outputs[:held], middle[:held] @ weight.T + bias, fixed)

        def make(build: Build) -> fx.Node:
            return Maker(build, layer).pointwise(bind(layer.node)["input"], "point", weight, bias)

        return Fitted(error, "1 x 1", make)
