"""SqueezeNet's fire module in place of a 3 x 3 convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.edit import Build
from graphopt.errors import PassError
from graphopt.ops import bind
from graphopt.passes.compact.substitute import (
    Cost,
    Fitted,
    Layer,
    Maker,
    Substitute,
    macs,
    outputs_of,
    projection,
)
from graphopt.passes.compact.two_stage import Head, Solution, covariance_root, fit
from graphopt.registry import register


@register
@dataclass(frozen=True)
class SqueezeSubstitute(Substitute):
    """Replace a 3 x 3 convolution by a fire module (Iandola et al. 2016).

    ``concat(E1 z, E3 * z)``, ``z = relu(S x + b)``: S squeezes the channels by 1 x 1 to ``squeeze`` of the outputs (SqueezeNet:
    0.125), rounded to a multiple of 8; E3 makes ``expand`` of the outputs by 3 x 3 and E1 the others, the first, by 1 x 1.
    The activation that follows the layer follows the module. S is the projection of the inputs that keeps the
    output best, E1 and E3 are its least squares complement on sampled activations.
    A stride is E's: the 3 x 3 filters then read the very pixels that the layer read, while a stride of S would throw
    three quarters of them away; that costs a squeeze at the input's size, which is counted.
    Declines other kernels, groups, weights that are shared, computed, masked or fake-quantized, and modules that are
    no smaller.
    """

    name: ClassVar[str] = "squeeze-substitute"

    squeeze: float = 0.25
    expand: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.squeeze <= 1:
            raise PassError(
                f"{self.name}: squeeze must be above 0 and at most 1, not {self.squeeze}"
            )
        if not 0 < self.expand <= 1:
            raise PassError(f"{self.name}: expand must be above 0 and at most 1, not {self.expand}")

    def unfit(self, layer: Layer) -> str | None:
        rows, columns = layer.weight.shape[2:]
        return None if rows == columns == 3 else f"its kernel is {rows} x {columns}, not 3 x 3"

    def widths(self, layer: Layer) -> tuple[int, int, int]:
        """Channels of S, E1 and E3."""
        outputs, inputs = layer.weight.shape[:2]
        wanted = self.squeeze * outputs
        squeezed = round(wanted / 8) * 8 if wanted >= 8 else round(wanted)
        spatial = min(outputs, max(1, round(self.expand * outputs)))
        return min(inputs, max(1, squeezed)), outputs - spatial, spatial

    def cost(self, layer: Layer) -> Cost:
        inputs = layer.weight.shape[1]
        squeezed, point, spatial = self.widths(layer)
        count, _, *sizes = layer.made
        first = macs((layer.given[0], *layer.given[2:]), (squeezed, inputs))
        second = macs((count, *sizes), (squeezed, point + 9 * spatial))
        weights = squeezed * (inputs + point + 9 * spatial)
        return Cost(weights + squeezed + point + spatial, first + second)

    def fit(self, layer: Layer, inputs: Tensor) -> Fitted:
        squeezed, point, spatial = self.widths(layer)
        taps = layer.weight.flatten(2)
        wanted = torch.cat([taps[:point, :, 4], taps[point:].transpose(1, 2).flatten(0, 1)])
        first, rest = projection(wanted[:, :, None], covariance_root(inputs), squeezed)
        heads, seconds = [], []
        if point:
            heads.append(Head(slice(0, point), centre=True))
            seconds.append(rest[:point])
        heads.append(Head(slice(point, point + spatial)))
        seconds.append(rest[point:].reshape(spatial, 9, squeezed).transpose(1, 2).flatten(1))
        start = Solution(
            first[..., None],
            torch.zeros(squeezed),
            seconds,
            [torch.zeros(len(second)) for second in seconds],
        )
        outputs = outputs_of(layer, inputs)
        fixed = self.fixed(layer)
        solution, error = fit(inputs, outputs, start, heads, True, fixed)
        text = f"fire {squeezed} -> {point} + {spatial}"
        return Fitted(error, text, lambda build: _fire(build, layer, solution, spatial))


def _fire(build: Build, layer: Layer, solution: Solution, spatial: int) -> fx.Node:
    maker, ones, zeros = Maker(build, layer), [1, 1], [0, 0]
    squeezed = build.relu(
        maker.convolution(
            bind(layer.node)["input"], "squeeze", solution.first, solution.shift, ones, zeros, ones
        )
    )
    wide = solution.seconds[-1].reshape(spatial, -1, 3, 3)
    geometry = layer.stride, layer.padding, layer.dilation
    expanded = maker.convolution(squeezed, "expand3", wide, solution.biases[-1], *geometry)
    if len(solution.seconds) == 1:
        return expanded
    point = maker.pointwise(squeezed, "expand1", solution.seconds[0], solution.biases[0])
    return build.concat([point, expanded], 1)
