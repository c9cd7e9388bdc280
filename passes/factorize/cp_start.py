"""Where alternating least squares begins: orthogonal rank-one terms from nested SVDs, or noise."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.passes.factorize.cp import MODES

_FILLER = 1e-3  # energy of random components where there are fewer terms than the rank


class Expansion:
    """Four-way tensors [batch, a, b, c, d] as sums of orthogonal rank-one terms, the largest first.

    The SVD of the unfolding [a, b * c * d], the SVD of each of its right vectors as [b, c * d], and of each of theirs as
    [c, d]. ``tails`` is what the first terms leave; ``start`` are those terms, a warm start of any rank.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.double()
        self._tensor = tensor
        batch, a, b, c, d = tensor.shape
        rows = tensor.flatten(2)
        self._first = torch.linalg.eigh(rows @ rows.transpose(1, 2)).eigenvectors  # [batch, a, i]
        planes = (self._first.transpose(1, 2) @ rows).reshape(batch, a, b, c * d)
        right = torch.linalg.eigh(planes.transpose(2, 3) @ planes).eigenvectors
        self._second = planes @ right  # [batch, i, b, n]
        last = right.transpose(2, 3).reshape(batch, a, c * d, c, d)
        self._fourth = torch.linalg.eigh(last.transpose(3, 4) @ last).eigenvectors
        self._third = last @ self._fourth  # [batch, i, n, c, p]
        weights = self._second.square().sum(dim=2)[..., None] * self._third.square().sum(dim=3)
        self._shape = weights.shape[1:]
        self._weights, self._order = weights.flatten(1).sort(dim=1, descending=True)

    def tails(self) -> Tensor:
        """[batch, terms + 1]: the squared error of the first 0, 1, ... terms, relative to the tensor's energy."""
        sums = self._weights.flip(1).cumsum(dim=1).flip(1)
        energy = sums[:, :1].clamp(min=1e-30)
        tails: Tensor = torch.cat([sums, torch.zeros_like(energy)], dim=1) / energy
        return tails

    def start(self, rank: int, generator: torch.Generator) -> list[Tensor]:
        """Four factors [batch, size, rank]; small noise stands in for missing terms."""
        batch = len(self._tensor)
        best = self._order[:, :rank]
        i, n, p = torch.unravel_index(best, self._shape)
        member = torch.arange(batch)[:, None]
        found = [
            self._first[member, :, i],
            self._second[member, i, :, n],
            self._third[member, i, n, :, p],
            self._fourth[member, i, n, :, p],
        ]
        modes = [factor.transpose(1, 2) for factor in found]
        missing = rank - best.shape[1]
        if missing:
            filler = noise(_FILLER**0.5 * self._tensor, missing, generator)
            modes = [torch.cat(pair, dim=2) for pair in zip(modes, filler, strict=True)]
        return modes


def noise(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Random components of equal norms whose energies sum to the tensors'."""
    energy = tensor.flatten(1).double().square().sum(dim=1)
    size = (energy / rank) ** (1 / (2 * MODES))
    found = []
    for axis in tensor.shape[1:]:
        factor = torch.randn(len(tensor), axis, rank, generator=generator, dtype=torch.float64)
        found.append(size[:, None, None] * factor / factor.norm(dim=1, keepdim=True))
    return found
