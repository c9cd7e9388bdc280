"""Channel pruning: which channels go together (``groups``), and the network without some of them (``shrink``, ``mask``)."""

from graphopt.passes.prune.channels.cost import Cost, CostModel
from graphopt.passes.prune.channels.coupling import Coupling, couple, groups
from graphopt.passes.prune.channels.group import Group, Member
from graphopt.passes.prune.channels.shrink import mask, shrink

__all__ = ["Cost", "CostModel", "Coupling", "Group", "Member", "couple", "groups", "mask", "shrink"]
