"""``Schedule``: how much is pruned, where and when."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from graphopt.arrays import to_numpy
from graphopt.choice import Choice
from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import Values

Chooser = Callable[[float], list[Tensor]]

DEFAULT_SPARSITY = 0.5


class Schedule(Choice):
    """A family of frozen dataclasses with a ``name``; a plugin adds its own by deriving from this class.

    ``compares``: scores of different layers meet.
    """

    compares: ClassVar[bool] = False

    @abstractmethod
    def chooser(
        self,
        granules: Sequence[Granules],
        scores: Sequence[Tensor],
        values: Values,
        evidence: Evidence,
    ) -> Chooser:
        """Measures what is to be measured; the result tells which granules stay (True) at a share to be pruned.

        A score of infinity is of a granule that must stay. A schedule without a share ignores it.
        """

    def resolved(self, fixed: float | None) -> Self:
        """The schedule with its sparsity settled: a half, or what the granularity fixes.

        Raises PassError where the two contradict each other.
        """
        if not hasattr(self, "sparsity"):
            if fixed is None:
                return self
            raise PassError(
                f"prune: the granularity fixes the sparsity of every layer, which schedule {self.name} chooses; "
                "take per-layer, global or gradual"
            )
        sparsity: float | None = self.sparsity
        if fixed is not None and sparsity is not None and abs(sparsity - fixed) > 1e-6:
            raise PassError(
                f"prune: the granularity fixes the sparsity at {fixed:g}; leave out sparsity={sparsity:g}"
            )
        settled = fixed if fixed is not None else sparsity
        changed: Any = {"sparsity": DEFAULT_SPARSITY if settled is None else settled}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]  # members are dataclasses


def check_share(label: str, name: str, value: float | None) -> None:
    """Raise PassError where an option is no share."""
    if value is not None and not 0 <= value <= 1:
        raise PassError(f"schedule {label}: {name} must be 0 to 1, not {value:g}")


def normalized(scores: Tensor) -> Tensor:
    """The scores over their root mean square, so that those of different layers compare."""
    size = scores[torch.isfinite(scores)].square().mean().sqrt()
    return scores / size if bool(size > 0) else scores


def settled(sparsity: float | None) -> float:
    return DEFAULT_SPARSITY if sparsity is None else sparsity


def lowest(
    scores: Sequence[Tensor], granules: Sequence[Granules], share: float, most: float = 1.0
) -> list[Tensor]:
    """Keep all but the lowest granules that hold ``share`` of the sets' weights; ties go in order.

    A set loses at most ``most`` of its granules, and none whose score is infinite. Where all granules hold as many
    weights the count is the share rounded to the nearest, and else the largest that does not exceed it.
    """
    held = list(scores)
    while True:
        kept = _lowest(held, granules, share)
        empty = [i for i, keep in enumerate(kept) if _lost(keep) > int(most * keep.numel() + 1e-9)]
        if not empty:
            return kept
        for i in empty:  # these give what they may, and the others more
            (rest,) = _smallest([held[i]], int(most * held[i].numel() + 1e-9))
            held[i] = torch.where(rest, held[i], torch.inf)


def _lost(keep: Tensor) -> int:
    return keep.numel() - int(torch.count_nonzero(keep))


def _lowest(scores: Sequence[Tensor], granules: Sequence[Granules], share: float) -> list[Tensor]:
    sizes = [one.sizes for one in granules]
    if isinstance(sizes[0], int) and all(isinstance(s, int) and s == sizes[0] for s in sizes):
        count = round(share * sum(one.numel() for one in scores))
        return [~drop for drop in _smallest(scores, count)]
    flat = torch.cat([one.flatten() for one in scores])
    weights = torch.cat(
        [
            torch.full((one.count,), s) if isinstance(s, int) else s.flatten()
            for one, s in zip(granules, sizes, strict=True)
        ]
    )
    order = flat.argsort(stable=True)
    amount = round(share * sum(one.elements for one in granules))
    count = int(torch.searchsorted(weights[order].cumsum(0), amount, right=True))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[order[:count]] = False
    keep |= flat == torch.inf
    parts = torch.split(keep, [one.numel() for one in scores])
    return [part.reshape(one.shape) for part, one in zip(parts, scores, strict=True)]


def _smallest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """True at the ``count`` smallest of all values, of equal ones the first; never at an infinite one."""
    if count <= 0:
        return [torch.zeros(one.shape, dtype=torch.bool) for one in scores]
    flat = np.concatenate([to_numpy(one).reshape(-1) for one in scores])
    if count < len(flat):
        flat.partition(count - 1)  # 0.06 s for 25 million floats; torch's kthvalue takes 0.7 s
    bound = float(flat[count - 1]) if count < len(flat) else torch.inf
    found = [(one < bound).contiguous() for one in scores]
    if bound == torch.inf:
        return found
    left = count - sum(int(torch.count_nonzero(one)) for one in found)
    for one, values in zip(found, scores, strict=True):
        if not left:
            break
        ties = (values == bound).flatten().nonzero().flatten()[:left]
        one.view(-1)[ties] = True
        left -= len(ties)
    return found
