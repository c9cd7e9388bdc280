"""Passes that merge one operator into another."""

from graphopt.passes.fuse.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fuse.lower_batch_norm import LowerBatchNorm

__all__ = ["FoldBatchNorm", "LowerBatchNorm"]
