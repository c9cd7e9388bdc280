"""Passes that remove what a program does not need."""

from graphopt.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphopt.passes.cleanup.fold_constants import FoldConstants
from graphopt.passes.cleanup.remove_dead_code import RemoveDeadCode
from graphopt.passes.cleanup.remove_identities import RemoveIdentities

__all__ = ["EliminateCommonSubexpressions", "FoldConstants", "RemoveDeadCode", "RemoveIdentities"]
