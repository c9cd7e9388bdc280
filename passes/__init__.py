"""Rewrite passes, one a file, by family; importing this package registers them all."""

from graphopt.passes.cleanup import EliminateCommonSubexpressions as EliminateCommonSubexpressions
from graphopt.passes.cleanup import FoldConstants as FoldConstants
from graphopt.passes.cleanup import RemoveDeadCode as RemoveDeadCode
from graphopt.passes.cleanup import RemoveIdentities as RemoveIdentities
from graphopt.passes.factorize import CpConv as CpConv
from graphopt.passes.factorize import DepthwiseSeparable as DepthwiseSeparable
from graphopt.passes.factorize import FlattenedConv as FlattenedConv
from graphopt.passes.factorize import LowRankLinear as LowRankLinear
from graphopt.passes.factorize import SpatialSvd as SpatialSvd
from graphopt.passes.factorize import TuckerConv as TuckerConv
from graphopt.passes.fuse import FoldBatchNorm as FoldBatchNorm
from graphopt.passes.fuse import LowerBatchNorm as LowerBatchNorm
from graphopt.passes.prune import ApplyMasks as ApplyMasks
from graphopt.passes.prune import GradualPruner as GradualPruner
from graphopt.passes.prune import Prune as Prune
from graphopt.passes.quantize import ActivationSpec as ActivationSpec
from graphopt.passes.quantize import CorrectBias as CorrectBias
from graphopt.passes.quantize import EqualizeWeights as EqualizeWeights
from graphopt.passes.quantize import InsertFakeQuant as InsertFakeQuant
from graphopt.passes.quantize import Override as Override
from graphopt.passes.quantize import QuantizationSpec as QuantizationSpec
from graphopt.passes.quantize import Quantize as Quantize
from graphopt.passes.quantize import WeightSpec as WeightSpec
