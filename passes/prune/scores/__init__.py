"""What a granule of weights is worth: one score a file."""

from graphopt.passes.prune.scores.activation import Activation
from graphopt.passes.prune.scores.batch_norm_scale import BatchNormScale
from graphopt.passes.prune.scores.magnitude import Magnitude
from graphopt.passes.prune.scores.obd import Obd
from graphopt.passes.prune.scores.random import Random
from graphopt.passes.prune.scores.score import Score
from graphopt.passes.prune.scores.taylor import Taylor

__all__ = ["Activation", "BatchNormScale", "Magnitude", "Obd", "Random", "Score", "Taylor"]
