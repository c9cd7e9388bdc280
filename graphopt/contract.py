"""What a pass promises about the network's output, checked by the driver on the example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Contract:
    """``exact``: the same bits. ``within``: ``max|y' - y| <= epsilon * max(1, max|y|)``. ``lossy``: measured, not bounded."""

    kind: str
    epsilon: float = 0.0

    def allows(self, error: float) -> bool:
        if self.kind == "lossy":
            return True
        return error <= self.epsilon  # a NaN error is allowed by no bound

    def __str__(self) -> str:
        return f"within({self.epsilon:g})" if self.kind == "within" else self.kind


exact = Contract("exact")
lossy = Contract("lossy")


def within(epsilon: float) -> Contract:
    """The output may move by ``epsilon`` relative to its largest element (absolute below 1)."""
    return Contract("within", epsilon)


def difference(before: Any, after: Any) -> float:
    """``max|y' - y| / max(1, max|y|)`` over all outputs; 0 only where all values are equal (NaN equals NaN, 0 equals -0)."""
    worst = 0.0
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if not isinstance(old, torch.Tensor):
            worst = max(worst, 0.0 if old == new else float("inf"))
            continue
        if torch.equal(old, new):
            continue
        old, new = old.detach().double(), new.detach().double()
        same = (old == new) | (old.isnan() & new.isnan())
        gap = torch.where(same, torch.zeros_like(old), (new - old).abs())
        if not bool(torch.isfinite(gap).all()):
            return float("inf")
        finite = old[torch.isfinite(old)].abs()
        scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
        worst = max(worst, float(gap.max()) / scale)
    return worst
