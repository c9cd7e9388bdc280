"""Canonical polyadic decomposition of a batch of four-way tensors, ``X = sum_r a_r o b_r o c_r o d_r``.

Alternating least squares (ALS) with a ridge. The best approximation of a given rank need not exist: components then grow
without bound against each other (Kruskal et al. 1989), which ruins training and quantization later. Each update minimises
``||X - X'||^2 + mu * sum of the factors' squared norms``, and after each sweep a component's norm is spread evenly over its
factors; together they bound the norms. Ours because tensorly's ``parafac`` takes one tensor and one start at a time: here a
batch is the restarts of one large tensor, or every filter of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = 4
_RIDGE = 1e-4  # of the energy, for balanced components of equal weight
_TOLERANCE = 1e-4  # of the error, gained by a sweep
_FILLER = 1e-3  # size of random components where the start has fewer terms, relative to equal ones


@dataclass
class Factors:
    """``modes``: four tensors [batch, size, rank]; ``errors`` [batch]: ``||X - X'||^2 / ||X||^2``."""

    modes: list[Tensor]
    errors: Tensor

    def pick(self, members: Tensor) -> Factors:
        """Those members of the batch."""
        return Factors([mode[members] for mode in self.modes], self.errors[members])


def als(tensor: Tensor, start: list[Tensor], sweeps: int) -> Factors:
    """Refine ``start`` (four factors [batch, size, rank]) by at most ``sweeps`` sweeps, fewer where none gains.

    ``tensor`` is [batch, four sizes], or a batch of 1 that all starts share. Its products run in its own type, the small
    systems in float64.
    """
    energy = tensor.flatten(1).double().square().sum(dim=1).clamp(min=1e-30)
    modes = [factor.double() for factor in start]
    _balance(modes)
    first = tensor.permute(0, 1, 3, 4, 2).contiguous()  # contracted over b, then over a
    second = tensor.permute(0, 2, 3, 4, 1).contiguous()
    ridge = _RIDGE / MODES * (energy / modes[0].shape[2]) ** (1 - 1 / MODES)
    errors = torch.ones_like(energy)
    for _ in range(sweeps):
        inner = _sweep(first, second, modes, ridge)
        whole = _overlaps(modes).sum(dim=(1, 2))
        now = ((energy - 2 * inner + whole) / energy).clamp(min=0)
        _balance(modes)
        settled = bool((errors - now <= _TOLERANCE * errors).all())
        errors = now
        if settled:
            break
    return Factors(modes, errors)


def terms(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The largest ``rank`` terms of each tensor's expansion in orthogonal rank-one tensors: a warm start.

    The SVD of the unfolding [a, b * c * d], the SVD of each of its right vectors as [b, c * d], and of each of theirs as
    [c, d]. Small random terms stand in where there are not enough.
    """
    tensor = tensor.double()
    batch, a, b, c, d = tensor.shape
    rows = tensor.flatten(2)
    outer = torch.linalg.eigh(rows @ rows.transpose(1, 2)).eigenvectors  # [batch, a, a]
    inner = (outer.transpose(1, 2) @ rows).reshape(batch, a, b, c * d)
    right = torch.linalg.eigh(inner.transpose(2, 3) @ inner).eigenvectors  # [batch, a, c * d, n]
    second = inner @ right  # [batch, a, b, n]
    planes = right.transpose(2, 3).reshape(batch, a, c * d, c, d)
    fourth = torch.linalg.eigh(planes.transpose(3, 4) @ planes).eigenvectors  # [batch, a, n, d, p]
    third = planes @ fourth  # [batch, a, n, c, p]
    weights = second.square().sum(dim=2)[..., None] * third.square().sum(dim=3)  # [batch, a, n, p]
    count = min(rank, weights[0].numel())
    best = weights.flatten(1).topk(count, dim=1).indices  # [batch, count]
    i, n, p = torch.unravel_index(best, weights.shape[1:])
    member = torch.arange(batch)[:, None]
    found = [
        outer[member, :, i],
        second[member, i, :, n],
        third[member, i, n, :, p],
        fourth[member, i, n, :, p],
    ]
    modes = [factor.transpose(1, 2) for factor in found]
    if count < rank:
        size = _FILLER ** (1 / MODES)
        filler = [size * factor for factor in noise(tensor, rank - count, batch, generator)]
        modes = [torch.cat(pair, dim=2) for pair in zip(modes, filler, strict=True)]
    return modes


def noise(tensor: Tensor, rank: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Random components whose energies sum to about the tensor's."""
    energy = tensor.flatten(1).double().square().sum(dim=1).clamp(min=1e-30)
    size = (energy / rank) ** (1 / (2 * MODES))
    return [
        size[:, None, None]
        * torch.nn.functional.normalize(
            torch.randn(batch, n, rank, generator=generator, dtype=torch.float64), dim=1
        )
        for n in tensor.shape[1:]
    ]


def _sweep(first: Tensor, second: Tensor, modes: list[Tensor], ridge: Tensor) -> Tensor:
    """Update each mode in turn; the inner products of the tensors with the new approximations."""
    batch, rank = modes[0].shape[0], modes[0].shape[2]
    a, c, d, b = first.shape[1:]
    planes = (modes[2][:, :, None] * modes[3][:, None]).reshape(batch, 1, c * d, rank)
    planes = planes.to(first.dtype)
    partial = _product(first.reshape(-1, a * c * d, b), modes[1]).reshape(batch, a, c * d, rank)
    modes[0] = _solve((partial * planes).sum(dim=2), modes, 0, ridge)
    partial = _product(second.reshape(-1, b * c * d, a), modes[0]).reshape(batch, b, c * d, rank)
    modes[1] = _solve((partial * planes).sum(dim=2), modes, 1, ridge)
    small = torch.einsum("nbkr,nbr->nkr", partial, modes[1].to(first.dtype)).double()
    small = small.reshape(batch, c, d, rank)
    modes[2] = _solve((small * modes[3][:, None]).sum(dim=2), modes, 2, ridge)
    right = (small * modes[2][:, :, None]).sum(dim=1)
    modes[3] = _solve(right, modes, 3, ridge)
    return (right * modes[3]).sum(dim=(1, 2))


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    """[batch or 1, rows, k] x [batch, k, rank]: one product where the matrix is shared."""
    factor = factor.to(matrix.dtype)
    if len(matrix) == len(factor):
        return matrix @ factor
    batch, k, rank = factor.shape
    wide = matrix[0] @ factor.transpose(0, 1).reshape(k, batch * rank)
    return wide.reshape(-1, batch, rank).transpose(0, 1)


def _solve(right: Tensor, modes: list[Tensor], mode: int, ridge: Tensor) -> Tensor:
    """The factor F [batch, size, rank] with ``F (G + ridge I) = right``, G the other modes' overlaps."""
    system = _overlaps([m for index, m in enumerate(modes) if index != mode])
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    root = torch.linalg.cholesky(system)
    return torch.cholesky_solve(right.double().transpose(1, 2), root).transpose(1, 2)


def _overlaps(modes: list[Tensor]) -> Tensor:
    """``<component r, component s>`` over ``modes``, [batch, rank, rank]."""
    product = modes[0].transpose(1, 2) @ modes[0]
    for mode in modes[1:]:
        product = product * (mode.transpose(1, 2) @ mode)
    return product


def _balance(modes: list[Tensor]) -> None:
    """Let each component's four factors have one norm."""
    norms = [mode.norm(dim=1, keepdim=True).clamp(min=1e-30) for mode in modes]
    mean = torch.stack(norms).log().mean(dim=0).exp()
    for index, norm in enumerate(norms):
        modes[index] = modes[index] * (mean / norm)
