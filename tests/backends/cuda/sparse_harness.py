"""Convolutions pruned 2:4, run by the interpreter on sparse tensor cores."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.sparse_conv import sparse_conv
from graphopt.backends.cuda.sparse_pack import pack_sparse
from graphopt.backends.cuda.sparse_plan import SparseTile, plan_sparse
from tests.backends.cuda.harness import AMPERE, ConvCase

Array = np.ndarray[Any, Any]


def prune(weight: Array, rng: np.random.Generator, most: int = 2) -> Array:
    """OIHW with at most ``most`` nonzeros, at random places, in every four neighbouring inputs of one tap."""
    out, channels, *taps = weight.shape
    groups = -(-channels // 4)
    places = rng.random((out, groups, 4, *taps)).argsort(2).argsort(2)
    mask = (places < rng.integers(0, most + 1, (out, groups, 1, *taps))).reshape(out, -1, *taps)
    pruned: Array = weight * mask[:, :channels]
    return pruned


class SparseCase(ConvCase):
    """A case whose weights are pruned 2:4."""

    def __init__(self, workload: Conv2d, batch: int = 2, seed: int = 0) -> None:
        super().__init__(workload, batch, seed)
        self.weight = prune(self.weight, self.rng)

    def by_sparse_tensor_cores(self, tile: SparseTile | None = None) -> Array:
        plan = plan_sparse(self.workload, AMPERE, tile)
        packed = pack_sparse(plan, self.weight, self.bias, self.multiplier)
        return self._run(sparse_conv(plan, AMPERE), packed)
