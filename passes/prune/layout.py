"""Every layer's weight as ``[groups, outputs, inputs, taps]``, outputs and inputs counted within a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt import ops

LAYERS = tuple(
    op.name
    for op in ops.TABLE
    if op.kind in ("convolution", "transposed_convolution", "linear") and op.weight is not None
)


@dataclass(frozen=True)
class Layout:
    """How a weight's axes are to be read: ``[O, I / groups, *k]``, or ``[I, O / groups, *k]`` of a transposed one."""

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, layer: fx.Node) -> Layout:
        arguments = ops.bind(layer)
        op = ops.info(layer)
        assert op is not None
        shape = tuple(int(size) for size in arguments["weight"].meta["val"].shape)
        return cls(shape, int(arguments.get("groups", 1)), op.kind == "transposed_convolution")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, outputs a group, inputs a group, taps."""
        first, second = self.shape[0] // self.groups, self.shape[1]
        taps = math.prod(self.shape[2:])
        outputs, inputs = (second, first) if self.transposed else (first, second)
        return self.groups, outputs, inputs, taps

    def rows(self, weight: Tensor) -> Tensor:
        """A view of the weight as ``[groups, outputs, inputs, taps]``."""
        groups, outputs, inputs, taps = self.sizes
        weight = weight.expand(self.shape)
        if self.transposed:
            return weight.reshape(groups, inputs, outputs, taps).transpose(1, 2)
        return weight.reshape(groups, outputs, inputs, taps)

    def weight(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows``."""
        if self.transposed:
            rows = rows.transpose(1, 2)
        return rows.reshape(self.shape)

    def by_output(self, values: Tensor) -> Tensor:
        """A value for each of the layer's output channels, at every element of the weight."""
        groups, outputs, _, _ = self.sizes
        return self.weight(values.reshape(groups, outputs, 1, 1).expand(self.sizes))
