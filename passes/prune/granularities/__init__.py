"""Which weights are pruned as one: one granularity a file."""

from graphopt.passes.prune.granularities.block import Block
from graphopt.passes.prune.granularities.channel import Channel
from graphopt.passes.prune.granularities.element import Element
from graphopt.passes.prune.granularities.filter import Filter
from graphopt.passes.prune.granularities.granularity import Granularity
from graphopt.passes.prune.granularities.n_m import NM

__all__ = ["NM", "Block", "Channel", "Element", "Filter", "Granularity"]
