"""Rewrite passes, one a file, by family; importing this package registers them all."""

from graphopt.passes.cleanup import EliminateCommonSubexpressions as EliminateCommonSubexpressions
from graphopt.passes.cleanup import FoldConstants as FoldConstants
from graphopt.passes.cleanup import RemoveDeadCode as RemoveDeadCode
from graphopt.passes.cleanup import RemoveIdentities as RemoveIdentities
from graphopt.passes.fuse import FoldBatchNorm as FoldBatchNorm
from graphopt.passes.fuse import LowerBatchNorm as LowerBatchNorm
from graphopt.passes.quantize import (
    ActivationSpec,
    InsertFakeQuant,
    Override,
    QuantizationSpec,
    Quantize,
    WeightSpec,
)

__all__ = [
    "ActivationSpec",
    "InsertFakeQuant",
    "Override",
    "QuantizationSpec",
    "Quantize",
    "WeightSpec",
]
