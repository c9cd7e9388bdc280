"""Masked and shrunk networks made by the two functions under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

import graphopt as go
from graphopt.edit import Edit, sweep
from graphopt.passes.prune import channels
from graphopt.verify import check_same_interface, verify

Change = Callable[[Edit, dict[channels.Group, Tensor]], None]
Choice = dict[int, Tensor]  # number of a group -> the channels to keep


def masked(program: go.Program, choice: Choice) -> go.Program:
    return _applied(program, choice, channels.mask)


def shrunk(program: go.Program, choice: Choice) -> go.Program:
    result = _applied(program, choice, channels.shrink)
    verify(result)
    check_same_interface(program, result)
    return result


def _applied(program: go.Program, choice: Choice, change: Change) -> go.Program:
    """What the driver does, without its measurements."""
    edit = Edit(program.clone(), "prune")
    groups = channels.groups(edit.program)
    change(edit, {groups[number]: kept for number, kept in choice.items()})
    sweep(edit.program)
    edit.program.graph_module.recompile()
    return edit.program


def draw(groups: tuple[channels.Group, ...] | list[channels.Group], seed: int) -> Choice:
    """Channels to keep of most groups: a random number of them, at random; sometimes all but one, sometimes all."""
    rng = np.random.default_rng(seed)
    choice: Choice = {}
    for number, group in enumerate(groups):
        style = rng.integers(0, 5)
        if style == 0:
            continue
        wanted = group.size - group.blocks if style == 1 else float(rng.uniform(0, group.size))
        scores = torch.from_numpy(rng.uniform(size=group.size))
        choice[number] = group.best(scores, group.count(wanted))
    return choice


def cut(
    coupling: channels.Coupling, choice: Choice, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``tensors`` (by parameter) without what the members of the groups say goes: an oracle that knows no graph."""
    stays: dict[tuple[str, int], Tensor] = {}
    for number, kept in choice.items():
        for member in coupling.groups[number].members:
            goes = (member.channel >= 0) & ~torch.isin(member.channel, kept)
            key = (member.parameter, member.axis)
            stays[key] = stays.get(key, torch.ones_like(goes)) & ~goes
    out = dict(tensors)
    for (name, axis), mask in sorted(stays.items(), key=lambda item: -item[0][1]):
        if name not in out:
            continue
        if mask.dim() == 1:
            out[name] = out[name].movedim(axis, 0)[mask].movedim(0, axis)
        else:  # a grouped convolution's inputs: each block of rows has columns of its own
            blocks = out[name].chunk(len(mask))
            out[name] = torch.cat([b[:, m] for b, m in zip(blocks, mask, strict=True)])
    return out
