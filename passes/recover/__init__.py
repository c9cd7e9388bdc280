"""Training as a step of a recipe; ``graphopt.fine_tune`` and ``graphopt.distill`` take everything that YAML cannot hold."""

from graphopt.passes.recover.distill import Distill as Distill
from graphopt.passes.recover.fine_tune import FineTune as FineTune
