"""Inception's factorizations of large filters: n x n into 1 x n and n x 1, 5 x 5 into two of 3 x 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
class InceptionFactorize(Substitute):
    """Replace an n x n convolution by 1 x n and n x 1, or a 5 x 5 one by two of 3 x 3 (Szegedy et al. 2016, section 3).

    ``B * relu(A * x + a) + b`` with ``width`` times the outputs in between (``relu=False``: nothing but the two; Szegedy et al. found
    the ReLU better). ``form``: ``asymmetric``, ``stacked`` (5 x 5 only), or ``auto``, which stacks 5 x 5. A is the
    projection that keeps the output best, B its least squares complement on sampled activations.
    The stride of the columns is A's and that of the rows B's; stacked, both are B's, so that the two read the very
    pixels that the layer read. Padding is halved between stacked ones.
    Declines kernels that are not square, odd and at least 3, groups, weights that are shared, computed, masked or
    fake-quantized, and pairs that are no smaller.
    """

    name: ClassVar[str] = "inception-factorize"

    width: float = 1.0
    form: Literal["auto", "asymmetric", "stacked"] = "auto"
    relu: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width > 0:
            raise PassError(f"{self.name}: width must be positive, not {self.width}")
        if self.form not in ("auto", "asymmetric", "stacked"):
            raise PassError(
                f"{self.name}: form must be auto, asymmetric or stacked, not {self.form!r}"
            )

    def unfit(self, layer: Layer) -> str | None:
        rows, columns = layer.weight.shape[2:]
        if rows != columns or rows % 2 == 0 or rows < 3:
            return f"its kernel is {rows} x {columns}: not square, odd and at least 3"
        if self.form == "stacked" and rows != 5:
            return f"its kernel is {rows} x {columns}, not 5 x 5"
        return None

    def _stacks(self, layer: Layer) -> bool:
        return self.form == "stacked" or (self.form == "auto" and layer.weight.shape[2] == 5)

    def _between(self, layer: Layer) -> int:
        outputs, inputs, size, _ = layer.weight.shape
        most = 9 * inputs if self._stacks(layer) else size * min(inputs, outputs)
        return min(most, max(1, round(self.width * outputs)))

    def cost(self, layer: Layer) -> Cost:
        outputs, inputs, size, _ = layer.weight.shape
        between, taps = self._between(layer), 9 if self._stacks(layer) else size
        count, _, *made = layer.made
        first = macs((count, *self._first_sizes(layer)), (between, inputs, taps))
        second = macs((count, *made), (outputs, between, taps))
        weights = taps * between * (inputs + outputs)
        return Cost(weights + outputs + (between if self.relu else 0), first + second)

    def _first_sizes(self, layer: Layer) -> list[int]:
        """Height and width of what A makes."""
        height, width = layer.given[2:]
        if not self._stacks(layer):
            return [height, layer.made[3]]
        halves = [(padding + 1) // 2 for padding in layer.padding]
        sizes = zip((height, width), halves, layer.dilation, strict=True)
        return [size + 2 * half - 2 * dilation for size, half, dilation in sizes]

    def fit(self, layer: Layer, inputs: Tensor) -> Fitted:
        outputs, size = layer.weight.shape[0], layer.weight.shape[2]
        between = self._between(layer)
        start = (
            _stacked(layer, inputs, between)
            if self._stacks(layer)
            else _asymmetric(layer, inputs, between)
        )
        zeros = torch.zeros(between)
        begun = Solution(start[0], zeros, [start[1].flatten(1)], [torch.zeros(outputs)])
        made, head = outputs_of(layer, inputs), [Head(slice(0, outputs))]
        fixed = self.fixed(layer)
        solution, error = fit(inputs, made, begun, head, self.relu, fixed)
        kernels = "3 x 3, 3 x 3" if self._stacks(layer) else f"1 x {size}, {size} x 1"
        return Fitted(
            error, f"{kernels} over {between}", lambda build: self._pair(build, layer, solution)
        )

    def _pair(self, build: Build, layer: Layer, solution: Solution) -> fx.Node:
        maker, size = Maker(build, layer), layer.weight.shape[2]
        (rows, columns), (above, beside), dilation = layer.stride, layer.padding, layer.dilation
        if self._stacks(layer):
            halves = [(padding + 1) // 2 for padding in layer.padding]
            rest = [p - half for p, half in zip(layer.padding, halves, strict=True)]
            geometry = (([1, 1], halves, dilation), (layer.stride, rest, dilation))
            shape = [3, 3]
        else:
            geometry = (
                ([1, columns], [0, beside], [1, dilation[1]]),
                ([rows, 1], [above, 0], [dilation[0], 1]),
            )
            shape = [size, 1]
        shift = solution.shift if self.relu else None
        value = maker.convolution(
            bind(layer.node)["input"], "first", solution.first, shift, *geometry[0]
        )
        if self.relu:
            value = build.relu(value)
        second = solution.seconds[0].reshape(len(solution.seconds[0]), -1, *shape)
        return maker.convolution(value, "second", second, solution.biases[0], *geometry[1])


def _asymmetric(layer: Layer, inputs: Tensor, between: int) -> tuple[Tensor, Tensor]:
    """``W[o, i, y, x] ~= sum_m B[o, m, y] A[m, i, x]``: the SVD of W as an [out * rows, in * columns] matrix, inputs whitened."""
    outputs, _, size, _ = layer.weight.shape
    rows = layer.weight.transpose(1, 2).flatten(0, 1)  # [out * rows, in, columns]
    first, second = projection(rows, covariance_root(inputs), between)
    b = second.reshape(outputs, size, between).transpose(1, 2)[:, :, :, None]
    return first[:, :, None, :], b.contiguous()


def _stacked(layer: Layer, inputs: Tensor, between: int) -> tuple[Tensor, Tensor]:
    """A spans the 3 x 3 pieces of the 5 x 5 filters best: their principal components, inputs whitened.

    B begins at 0: least squares gives it its values.
    """
    outputs, channels = layer.weight.shape[:2]
    pieces = layer.weight.unfold(2, 3, 1).unfold(3, 3, 1)  # [out, in, 3, 3, y, x]
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).reshape(outputs * 9, channels, 9)
    first, _ = projection(pieces, covariance_root(inputs), between)
    return first.reshape(between, channels, 3, 3), torch.zeros(outputs, between, 3, 3)
