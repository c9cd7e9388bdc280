"""Channels: removed from the network with everything that makes or reads them, so that it gets smaller and faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes.prune.channels import CostModel, Group, Member, couple, shrink
from graphopt.passes.prune.granularities.granularity import Granularity
from graphopt.passes.prune.granules import Decision, Granules
from graphopt.passes.prune.layout import LAYERS
from graphopt.passes.prune.weights import Decline, Selection, Weight, find
from graphopt.program import Program


@dataclass(frozen=True, eq=False)
class Coupled(Granules):
    """The channels of one group; a channel's elements are its rows and columns of all weights in the group."""

    group: Group
    members: tuple[tuple[Weight, Member], ...]
    costs: CostModel = field(repr=False)
    in_macs: bool = False

    @property
    def label(self) -> str:
        return self.group.name

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(dict.fromkeys(weight for weight, _ in self.members))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.group.size,)

    @cached_property
    def sizes(self) -> Tensor | int:
        sizes = self._by_channel({pair: _each(*pair) for pair in self.members}).long()
        return int(sizes[0]) if bool((sizes == sizes[0]).all()) else sizes

    @cached_property
    def price(self) -> float:
        if not self.in_macs:
            return 1.0
        shares = {
            (weight, member): _each(weight, member)
            * sum(map(ops.macs, weight.layers))
            / weight.size
            for weight, member in self.members
        }
        return float(self._by_channel(shares).sum()) / max(1, self.elements)

    def mean(self, elements: Mapping[Weight, Tensor], makers: bool = False) -> Tensor:
        counted = [
            (weight, member)
            for weight, member in self.members
            if weight in elements and (member.role == "output" or not makers)
        ]
        sums = {(w, member): _along(elements[w].float(), member) for w, member in counted}
        sizes = self._by_channel({pair: _each(*pair) for pair in counted})
        return self._by_channel(sums) / sizes.clamp(min=1)

    def _by_channel(self, values: Mapping[tuple[Weight, Member], Tensor | float]) -> Tensor:
        """The sums of values given for the indices of members' axes, a number where they are all equal."""
        total = torch.zeros(self.group.size + 1)  # the last for indices that are not the group's
        for (_, member), value in values.items():
            index = torch.where(member.channel >= 0, member.channel, self.group.size).flatten()
            total.index_add_(
                0, index, torch.as_tensor(value).float().expand(member.channel.shape).flatten()
            )
        return total[:-1]

    def masks(self, keep: Tensor) -> dict[Weight, Tensor]:
        padded = torch.cat([keep.float(), torch.ones(1)])
        masks = {w: torch.ones(w.layout.shape) for w in self.weights}
        for weight, member in self.members:
            _mask(masks[weight], member, padded[member.channel])
        return masks


def _each(weight: Weight, member: Member) -> float:
    """How many elements of the weight each index of the member's axis has."""
    return weight.size / member.channel.numel()


def _along(values: Tensor, member: Member) -> Tensor:
    """The sums over everything but the member's axis, in the shape of ``member.channel``."""
    if member.channel.dim() == 1:
        return values.movedim(member.axis, 0).flatten(1).sum(1)
    groups = member.channel.shape[0]  # each group of rows has columns of its own
    rows = values.reshape(groups, -1, *values.shape[1:])
    return rows.transpose(1, 2).flatten(2).sum(2)


def _mask(mask: Tensor, member: Member, stays: Tensor) -> None:
    """Multiply in place along the member's axis."""
    if stays.dim() == 1:
        mask.movedim(member.axis, -1).mul_(stays)
    else:
        rows = mask.view(stays.shape[0], -1, *mask.shape[1:])
        rows.mul_(stays.reshape(stays.shape[0], 1, -1, *[1] * (mask.dim() - 2)))


@dataclass(frozen=True)
class Channel(Granularity):
    """``W[o, i, ...]`` without rows and columns: a channel goes with all that makes or reads it (Li et al. 2017, Fang et al. 2023).

    With it go the norms on it and the channels tied to it by residual adds, concatenations, depthwise and grouped
    convolutions or reshapes. Parameters lose rows and columns: no mask is left. ``of``: what the schedule's sparsity is a share of, the network's
    multiply-accumulates, its parameters, or each group's channels. ``multiple``: as many channels stay as are a multiple of
    it, where the group allows it (8 or 16 suit vector units). ``layers`` and ``exclude`` of the pass name the layers that
    make the channels; a layer that is left out may still lose inputs. Declines channels that the outputs show, or that an
    operator mixes.
    """

    name: ClassVar[str] = "channel"
    masks: ClassVar[bool] = False
    whole_channels: ClassVar[bool] = True

    of: Literal["macs", "parameters", "channels"] = "macs"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.of not in ("macs", "parameters", "channels"):
            raise PassError(
                f"granularity channel: of must be macs, parameters or channels, not {self.of!r}"
            )
        if self.multiple < 1:
            raise PassError(
                f"granularity channel: multiple must be at least 1, not {self.multiple}"
            )

    def split(
        self, program: Program, weights: Sequence[Weight], decline: Decline
    ) -> list[Granules]:
        coupling = couple(program)
        chosen = {node for weight in weights for node in weight.layers}
        known = {w.name: w for w in find(program, Selection(), lambda _node, _reason: None)}
        known.update({weight.name: weight for weight in weights})
        costs = CostModel(coupling)
        for node, reason in coupling.frozen.items():
            if node in chosen:
                decline(node, reason)
        found: list[Granules] = []
        for group in sorted(coupling.groups, key=lambda group: min(group.layers)):
            makers = [node for node in group.layers if ops.is_op(node, *LAYERS)]
            others = [node for node in makers if node not in chosen]
            if others:
                for node in makers:
                    if node in chosen:
                        decline(node, f"its channels are tied to those of {others[0].name}")
                continue
            members = tuple(
                (known[member.parameter], member)
                for member in group.members
                if member.role in ("output", "input") and member.parameter in known
            )
            if members:
                found.append(Coupled(group, members, costs, self.of == "macs"))
        return found

    def settle(self, decisions: list[Decision]) -> list[Decision]:
        return [replace(one, keep=self._settled(one)) for one in decisions]

    def _settled(self, decision: Decision) -> Tensor:
        group = _coupled(decision).group
        count = group.count(int(decision.keep.sum()), self.multiple)
        if count >= group.size:
            return torch.ones(group.size, dtype=torch.bool)
        keep = torch.zeros(group.size, dtype=torch.bool)
        keep[group.best(decision.scores, count)] = True
        return keep

    def removed(self, decisions: Sequence[Decision]) -> float | None:
        if self.of == "channels" or not decisions:
            return None
        costs = _coupled(decisions[0]).costs
        before, after = costs({}), costs(_kept(decisions))
        if self.of == "macs":
            return 1 - after.macs / max(1, before.macs)
        return 1 - after.parameters / max(1, before.parameters)

    def carry_out(
        self, edit: Edit, decisions: Sequence[Decision], monotone: bool, everywhere: bool
    ) -> None:
        before = _layers(edit)
        shrink(edit, _kept(decisions))
        total = sum(one.granules.count for one in decisions)
        kept = sum(int(one.keep.sum()) for one in decisions)
        edit.note(f"{total - kept} of {total} free channels in {len(decisions)} groups are removed")
        for name, (node, parameters, macs) in _layers(edit).items():
            _, had, cost = before[name]
            if parameters != had:
                shape = ops.bind(node)["weight"].meta["val"].shape
                text = f"weight {' x '.join(map(str, shape))}"
                edit.layer_changed(node, (had, parameters), (cost, macs), text=text)


def _coupled(decision: Decision) -> Coupled:
    assert isinstance(decision.granules, Coupled)
    return decision.granules


def _kept(decisions: Sequence[Decision]) -> dict[Group, Tensor]:
    """The channels that stay of every group that loses some."""
    return {
        _coupled(one).group: one.keep.nonzero().flatten()
        for one in decisions
        if not bool(one.keep.all())
    }


def _layers(edit: Edit) -> dict[str, tuple[fx.Node, int, int]]:
    """Each layer with the weights it reads and its multiply-accumulates, by name."""
    return {
        node.name: (node, ops.bind(node)["weight"].meta["val"].numel(), ops.macs(node))
        for node in edit.nodes(*LAYERS)
    }
