"""Pruning: one pass with three independent choices, what a weight is worth, how much goes, and in which pattern."""

from graphopt.passes.prune.apply_masks import ApplyMasks
from graphopt.passes.prune.gradual import GradualPruner
from graphopt.passes.prune.granularities import (
    NM,
    Block,
    Channel,
    Element,
    Filter,
    Granularity,
)
from graphopt.passes.prune.prune import Prune
from graphopt.passes.prune.schedules import (
    Global,
    Gradual,
    PerLayer,
    Schedule,
    Sensitivity,
    Threshold,
)
from graphopt.passes.prune.scores import (
    Activation,
    BatchNormScale,
    Magnitude,
    Obd,
    Random,
    Score,
    Taylor,
)

__all__ = [
    "NM",
    "Activation",
    "ApplyMasks",
    "BatchNormScale",
    "Block",
    "Channel",
    "Element",
    "Filter",
    "Global",
    "Gradual",
    "GradualPruner",
    "Granularity",
    "Magnitude",
    "Obd",
    "PerLayer",
    "Prune",
    "Random",
    "Schedule",
    "Score",
    "Sensitivity",
    "Taylor",
    "Threshold",
]
