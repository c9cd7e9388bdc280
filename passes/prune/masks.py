"""Masks in a program: which elements of the weights the chosen granules cover, and ``W -> mul(W, M)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.edit import Edit
from graphopt.passes.prune.granules import Decision
from graphopt.passes.prune.weights import Weight
from graphopt.program import Program


def masks_of(
    decisions: Sequence[Decision], program: Program, monotone: bool
) -> dict[Weight, Tensor]:
    """The mask of each weight, which stays 0 where an older one is if ``monotone``."""
    masks: dict[Weight, Tensor] = {}
    for decision in decisions:
        for weight, mask in decision.granules.masks(decision.keep).items():
            masks[weight] = masks[weight] * mask if weight in masks else mask
    for weight, mask in masks.items():
        old = weight.old_mask(program)
        new = mask.to(weight.tensor(program).dtype)
        masks[weight] = new * old if monotone and old is not None else new
    return masks


def apply_masks(
    edit: Edit, decisions: Sequence[Decision], monotone: bool, everywhere: bool
) -> None:
    """Mask what the decisions do not keep; ``everywhere`` puts a mask also where all is kept."""
    masks = masks_of(decisions, edit.program, monotone)
    kept = 0
    for weight, mask in masks.items():
        ones = int(torch.count_nonzero(mask))
        _set_mask(edit, weight, mask, everywhere or ones < mask.numel())
        kept += ones
    total = sum(mask.numel() for mask in masks.values())
    edit.note(f"{1 - kept / total:.1%} of {total:,} weights in {len(masks)} tensors are masked")


def _set_mask(edit: Edit, weight: Weight, mask: Tensor, insert: bool) -> None:
    """Let the weight's readers read ``W * M``; a weight without a mask gets one where ``insert``."""
    before = weight.effective(edit.program)
    old = weight.old_mask(edit.program)
    if old is not None:
        if torch.equal(old, mask):
            return
        assert weight.mask is not None
        edit.set_tensor(weight.mask, weight.on_device(edit.program, mask))
    elif insert:
        _insert(edit, weight, weight.on_device(edit.program, mask))
    else:
        return
    _record(edit, weight, before, weight.tensor(edit.program) * mask)


def _insert(edit: Edit, weight: Weight, mask: Tensor) -> None:
    anchor = weight.sources[0].next
    while anchor.op in ("placeholder", "get_attr"):
        anchor = anchor.next
    build = edit.build(anchor, weight.sources[:1])
    product = build.mul(
        weight.sources[0], build.parameter(f"{weight.name}_mask", mask, trainable=False)
    )
    for source in weight.sources:
        edit.replace(source, product)


def _record(edit: Edit, weight: Weight, before: Tensor, after: Tensor) -> None:
    """A row for each layer that reads the weight: weights and MACs that are not zero."""
    had, has = int(torch.count_nonzero(before)), int(torch.count_nonzero(after))
    size = float(before.float().norm())
    error = float((before - after).float().norm()) / size if size else 0.0
    for node in weight.layers:
        edit.layer_changed(
            node,
            parameters=(had, has),
            macs=(_macs(node, had, before), _macs(node, has, before)),
            error=error,
            text=f"{1 - has / before.numel():.1%} zeros",
        )


def _macs(node: fx.Node, nonzero: int, weight: Tensor) -> int:
    return round(ops.macs(node) * nonzero / weight.numel())
