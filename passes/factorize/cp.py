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
_TOLERANCE = 3e-4  # of the error, gained by a sweep


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
    grams = [_gram(mode) for mode in modes]
    for _ in range(sweeps):
        inner = _sweep(first, second, modes, grams, ridge)
        whole = _hadamard(grams).sum(dim=(1, 2))
        now = ((energy - 2 * inner + whole) / energy).clamp(min=0)
        _balance(modes, grams)
        settled = bool((errors - now <= _TOLERANCE * errors).all())
        errors = now
        if settled:
            break
    return Factors(modes, errors)


def _sweep(
    first: Tensor, second: Tensor, modes: list[Tensor], grams: list[Tensor], ridge: Tensor
) -> Tensor:
    """Update each mode and its Gram matrix in turn; the inner products of the tensors with the new approximations."""

    def solve(mode: int, right: Tensor) -> None:
        """``F (G + ridge I) = right`` for the mode's factor F, G the products of the other modes' components."""
        system = _hadamard([gram for index, gram in enumerate(grams) if index != mode])
        system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        root = torch.linalg.cholesky(system)
        right = right.double().transpose(1, 2)
        modes[mode] = torch.cholesky_solve(right, root).transpose(1, 2)
        grams[mode] = _gram(modes[mode])

    batch, rank = modes[0].shape[0], modes[0].shape[2]
    a, c, d, b = first.shape[1:]
    planes = (modes[2][:, :, None] * modes[3][:, None]).reshape(batch, 1, c * d, rank)
    planes = planes.to(first.dtype)
    partial = _product(first.reshape(-1, a * c * d, b), modes[1]).reshape(batch, a, c * d, rank)
    solve(0, (partial * planes).sum(dim=2))
    partial = _product(second.reshape(-1, b * c * d, a), modes[0]).reshape(batch, b, c * d, rank)
    solve(1, (partial * planes).sum(dim=2))
    small = (partial * modes[1][:, :, None].to(first.dtype)).sum(dim=1)
    small = small.double().reshape(batch, c, d, rank)
    solve(2, (small * modes[3][:, None]).sum(dim=2))
    right = (small * modes[2][:, :, None]).sum(dim=1)
    solve(3, right)
    return (right * modes[3]).sum(dim=(1, 2))


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    """[batch or 1, rows, k] x [batch, k, rank]: one product where the matrix is shared."""
    factor = factor.to(matrix.dtype)
    if len(matrix) == len(factor):
        return matrix @ factor
    batch, k, rank = factor.shape
    wide = matrix[0] @ factor.transpose(0, 1).reshape(k, batch * rank)
    return wide.reshape(-1, batch, rank).transpose(0, 1)


def _gram(mode: Tensor) -> Tensor:
    """The inner products of a mode's vectors, [batch, rank, rank]."""
    return mode.transpose(1, 2) @ mode


def _hadamard(grams: list[Tensor]) -> Tensor:
    """The inner products of components from those of their vectors."""
    product = grams[0] * grams[1]
    for gram in grams[2:]:
        product *= gram
    return product


def _balance(modes: list[Tensor], grams: list[Tensor] | None = None) -> None:
    """Let each component's four factors have one norm, and keep the Gram matrices true."""
    norms = [mode.norm(dim=1, keepdim=True).clamp(min=1e-30) for mode in modes]
    mean = torch.stack(norms).log().mean(dim=0).exp()
    for index, norm in enumerate(norms):
        modes[index] = modes[index] * (mean / norm)
        if grams is not None:
            grams[index] = grams[index] * (mean / norm) * (mean / norm).transpose(1, 2)
