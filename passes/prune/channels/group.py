"""``Group``: channels of which any may be removed, each with everything that goes with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from graphopt.passes.prune.channels.coupling import Coupling


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter's axis that a group's channels are part of.

    ``node`` reads the parameter for ``layer``. ``role`` is what it is there: "output" and "bias" of the layers that make
    the channels, "scale", "shift" and "statistic" of norms, "factor" of other operators, "qparam" of fake quantization,
    "input" of the layers that read the channels. ``channel[i]`` is the channel to which index i of ``axis`` belongs, -1
    where it is none of the group's; for a grouped convolution's input axis it is ``[groups, inputs per group]``, as each
    group of rows has columns of its own.
    """

    node: fx.Node
    role: str
    axis: int
    channel: Tensor = field(repr=False)
    layer: fx.Node

    @property
    def parameter(self) -> str:
        return str(self.node.target)


@dataclass(frozen=True, eq=False)
class Group:
    """``size`` channels, numbered from 0; what is true of one is true of all.

    ``layers`` make the channels and ``readers`` sum over them. ``block[c]``: equally many channels of each block have to
    be kept (grouped convolutions); all are of block 0 where that is not asked. ``part[c]``: at least one channel of each
    part has to be kept, because some axis consists of that part alone.
    """

    coupling: Coupling = field(repr=False)
    size: int
    members: tuple[Member, ...] = field(repr=False)
    layers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    block: Tensor = field(repr=False)
    part: Tensor = field(repr=False)
    classes: Tensor = field(repr=False)  # the coupling's own numbers of the channels

    @property
    def blocks(self) -> int:
        return int(self.block.max()) + 1

    @property
    def parts(self) -> int:
        return int(self.part.max()) + 1

    @property
    def name(self) -> str:
        """The first layer's name."""
        return self.layers[0].name if self.layers else self.members[0].layer.name

    def count(self, wanted: float, multiple: int = 1) -> int:
        """The number of channels nearest to ``wanted`` that can be kept, a multiple of ``multiple`` where there is one.

        Ties go up. A multiple of the number of blocks, and of ``multiple`` too where the group has that many channels.
        """
        if wanted >= self.size:
            return self.size
        least = self._least()
        step = lcm(self.blocks, multiple)
        options = [n for n in range(step, self.size + 1, step) if n >= least]
        options = options or list(range(least, self.size + 1, self.blocks))
        return min(options, key=lambda n: (abs(n - wanted), -n))

    def best(self, scores: Tensor, count: int) -> Tensor:
        """The ``count`` channels to keep by score, higher is better: the best of each block, one of each part at least."""
        if count != self.count(count):
            raise ValueError(f"{count} of the {self.size} channels of {self.name} cannot be kept")
        scores = scores.detach().double().clone()
        for part in range(self.parts):
            inside = torch.where(self.part == part)[0]
            scores[inside[scores[inside].argmax()]] = torch.inf
        kept = []
        for block in range(self.blocks):
            inside = torch.where(self.block == block)[0]
            kept.append(inside[scores[inside].topk(count // self.blocks).indices])
        return torch.cat(kept).sort().values

    def complaint(self, keep: Tensor) -> str | None:
        """Why ``keep`` is no valid choice of channels, or None."""
        if keep.dim() != 1 or keep.is_floating_point() or not keep.numel():
            return "the kept channels must be a vector of at least one index"
        if int(keep.min()) < 0 or int(keep.max()) >= self.size:
            return f"the kept channels must be 0 to {self.size - 1}"
        if len(set(keep.tolist())) != keep.numel():
            return "a channel is named twice"
        counts = torch.bincount(self.block[keep], minlength=self.blocks)
        if not (counts == counts[0]).all():
            return f"equally many channels of each of {self.blocks} blocks must be kept"
        if not torch.bincount(self.part[keep], minlength=self.parts).all():
            return "an axis would lose all of its channels"
        return None

    def _least(self) -> int:
        """The smallest number of channels that may be kept: in the block with the most parts, one of each."""
        pairs = set(zip(self.block.tolist(), self.part.tolist(), strict=True))
        return max(Counter(block for block, _ in pairs).values()) * self.blocks
