"""Factorizations: a layer becomes a chain of cheaper ones, with ranks chosen for the whole network."""

from graphopt.passes.factorize.cp_conv import CpConv
from graphopt.passes.factorize.depthwise_separable import DepthwiseSeparable
from graphopt.passes.factorize.flattened_conv import FlattenedConv
from graphopt.passes.factorize.low_rank_linear import LowRankLinear
from graphopt.passes.factorize.spatial_svd import SpatialSvd
from graphopt.passes.factorize.tucker_conv import TuckerConv

__all__ = [
    "CpConv",
    "DepthwiseSeparable",
    "FlattenedConv",
    "LowRankLinear",
    "SpatialSvd",
    "TuckerConv",
]
