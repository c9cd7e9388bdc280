"""How much is pruned, where and when: one schedule a file."""

from graphopt.passes.prune.schedules.global_ import Global
from graphopt.passes.prune.schedules.gradual import Gradual
from graphopt.passes.prune.schedules.per_layer import PerLayer
from graphopt.passes.prune.schedules.schedule import Schedule
from graphopt.passes.prune.schedules.sensitivity import Sensitivity
from graphopt.passes.prune.schedules.threshold import Threshold

__all__ = ["Global", "Gradual", "PerLayer", "Schedule", "Sensitivity", "Threshold"]
