"""Concatenations in place: the kernels that make the inputs write straight into their channels of the whole tensor.

``cat([a, b])`` then costs nothing: ``a`` is its channels from 0 on, ``b`` those behind them. A concatenation of the first
inputs of a later one (DenseNet) is a slice of that one. Where an input has no place (it is plain, stands in two
concatenations, or has another fill in its margins) all are copied, as any concatenation can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx

from graphopt.backends.cpu.workload import Layout
from graphopt.backends.lower.elementwise import ConcatStep
from graphopt.backends.lower.step import BYTES_PER_DOT, Margins, Step


def concatenations(nodes: Iterable[fx.Node], steps: Mapping[fx.Node, Step]) -> list[fx.Node]:
    """Those whose result is physical, in order."""
    found = (steps.get(node) for node in nodes)
    return [step.output for step in found if isinstance(step, ConcatStep) and not step.plain_output]


def place_in_slices(
    layouts: dict[fx.Node, Layout],
    steps: Mapping[fx.Node, Step],
    inputs: Mapping[fx.Node, Sequence[fx.Node]],
) -> set[fx.Node]:
    """Make slices of ``layouts`` where that is possible; return the concatenations that need no kernel.

    ``inputs`` has, for every physical concatenation in order, the values whose memory its inputs are.
    """
    placing = _Placing(layouts, steps)
    return {node for node, values in reversed(list(inputs.items())) if placing.place(node, values)}


class _Placing:
    """``whole[slice]`` is the concatenation whose memory a slice is; the latest come first."""

    def __init__(self, layouts: dict[fx.Node, Layout], steps: Mapping[fx.Node, Step]) -> None:
        self.layouts = layouts
        self.steps = steps
        self.whole: dict[fx.Node, fx.Node] = {}

    def place(self, node: fx.Node, values: Sequence[fx.Node]) -> bool:
        """Put the inputs where they belong in ``node``; False where they have to be copied."""
        if self._lie_side_by_side(values) and node not in self.whole:
            first = values[0]
            if not self._share_margins(self.whole[first], [node]):
                return False
            self._put(node, self.whole[first], self.layouts[first].first_channel)
            return True
        whole = self.whole.get(node, node)
        if not self._are_free(values) or not self._share_margins(whole, values):
            return False
        channel = self.layouts[node].first_channel
        for value in values:
            self._put(value, whole, channel)
            channel += self.layouts[value].channels
        return True

    def _put(self, value: fx.Node, whole: fx.Node, channel: int) -> None:
        channels = self.layouts[value].channels
        self.layouts[value] = replace(
            self.layouts[whole], channels=channels, first_channel=channel, shared=True
        )
        self.whole[value] = whole

    def _lie_side_by_side(self, values: Sequence[fx.Node]) -> bool:
        """True where the values are channels of one tensor already, in their order."""
        if values[0] not in self.whole or len({self.whole.get(value) for value in values}) != 1:
            return False
        channel = self.layouts[values[0]].first_channel
        for value in values:
            if self.layouts[value].first_channel != channel:
                return False
            channel += self.layouts[value].channels
        return True

    def _are_free(self, values: Sequence[fx.Node]) -> bool:
        """True for results of kernels, each of them once and in no other tensor, that begin at a whole dot product."""
        return len(set(values)) == len(values) and all(
            value in self.steps
            and not self.steps[value].plain_output
            and value not in self.whole
            and self.layouts[value].channels % _alignment(self.layouts[value]) == 0
            for value in values
        )

    def _share_margins(self, whole: fx.Node, values: Sequence[fx.Node]) -> bool:
        """Give the whole tensor the margins that all need; False where their fills differ."""
        layouts = [self.layouts[whole], *(self.layouts[value] for value in values)]
        fills = {layout.fill for layout in layouts if _margins(layout) != Margins()}
        if len(fills) > 1:
            return False
        needed = Margins()
        for layout in layouts:
            needed = needed.union(_margins(layout))
        for node in (whole, *(part for part, owner in self.whole.items() if owner is whole)):
            self.layouts[node] = replace(
                self.layouts[node],
                top=needed.top,
                bottom=needed.bottom,
                left=needed.left,
                right=needed.right,
                fill=max(fills, default=0),
            )
        return True


def _alignment(layout: Layout) -> int:
    return 1 if layout.dtype == "float32" else BYTES_PER_DOT


def _margins(layout: Layout) -> Margins:
    return Margins(layout.top, layout.bottom, layout.left, layout.right)
