"""The channel couplings of a program: which channels of which parameters must be kept or removed together.

``couple(program)`` walks once over the program, solves the ties and forms groups. A *masked* network has, for each
removed channel, zeros in the weight rows and bias of the layers that make it, in the scale and shift of norms on it, and
in whatever other parameter meets it; nothing else changes. The *shrunk* network has none of these indices at all. Both
compute the same outputs up to the order of sums: that is what every rule keeps to, or else freezes the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.arrays import to_numpy
from graphopt.errors import PassError

# The rules register themselves.
from graphopt.passes.prune.channels import layer_rules as layer_rules
from graphopt.passes.prune.channels import part_rules as part_rules
from graphopt.passes.prune.channels import pointwise_rules as pointwise_rules
from graphopt.passes.prune.channels import product_rules as product_rules
from graphopt.passes.prune.channels import shape_rules as shape_rules
from graphopt.passes.prune.channels.group import Group, Member
from graphopt.passes.prune.channels.grouping import Partition, partition
from graphopt.passes.prune.channels.labels import Axis, Classes, Fixed, Ids
from graphopt.passes.prune.channels.walk import Walk
from graphopt.program import Program

_ALONE = "all of its channels are coupled into one"


@dataclass(eq=False)
class Coupling:
    """``groups`` of channels that are free, and why each layer in ``frozen`` has channels that are not.

    ``share[layer]`` is the share of a layer's output channels that are free.
    """

    program: Program
    walk: Walk = field(repr=False)
    classes: Classes = field(repr=False)
    groups: tuple[Group, ...] = ()
    frozen: dict[fx.Node, str] = field(default_factory=dict)
    share: dict[fx.Node, float] = field(default_factory=dict)
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict, repr=False)

    def check_current(self, program: Program, pass_name: str) -> None:
        """Raise PassError where the program is another one, or has changed since its couplings were found."""
        same = program.graph is self.program.graph
        if not same or _shapes(program) != self.shapes:
            raise PassError(
                f"{pass_name}: the groups of channels are not those of this program as it is now; "
                "ask for channels.groups(edit.program) again"
            )

    def kept(self, keep: Mapping[Group, torch.Tensor]) -> NDArray[np.bool_]:
        """For every class, whether its channel stays."""
        kept = np.ones(self.classes.number, bool)
        for group, channels in keep.items():
            complaint = group.complaint(channels)
            if complaint is not None:
                raise ValueError(f"{complaint} of the channels of {group.name}")
            classes = to_numpy(group.classes)
            kept[classes] = False
            kept[classes[to_numpy(channels)]] = True
        return kept

    @property
    def graph(self) -> nx.Graph[fx.Node | Group]:
        """The coupling graph: an edge from each group to the layers that make, read or meet its channels."""
        graph: nx.Graph[fx.Node | Group] = nx.Graph()
        for group in self.groups:
            graph.add_node(group)
            for member in group.members:
                graph.add_edge(group, member.layer)
        return graph


def couple(program: Program) -> Coupling:
    """The couplings of ``program``. Reads the graph and shapes, never runs it."""
    walk, classes = _solved(program, {})
    choices = _other_factors(walk, classes)
    if choices:
        first = walk, classes
        walk, classes = _solved(program, choices)
        worse = {n for n in choices if n in walk.splits and _frozen(walk.splits[n][1], classes)}
        worse = {n for n in worse if not _frozen(first[0].splits[n][1], first[1])}
        if worse:
            walk, classes = _solved(program, {n: k for n, k in choices.items() if n not in worse})
    found = partition(classes, _axes(walk), walk.labels.balances)
    coupling = Coupling(program, walk, classes, shapes=_shapes(program))
    group_of = _add_groups(coupling, found)
    _explain(coupling, group_of)
    return coupling


def groups(program: Program) -> list[Group]:
    """The groups of channels of ``program`` that may be removed; give them to ``shrink`` or ``mask``."""
    return list(couple(program).groups)


def _shapes(program: Program) -> dict[fx.Node, torch.Size]:
    """Every node, parameters with their shapes."""
    return {
        node: program.tensor(node).shape if node.op == "get_attr" else torch.Size()
        for node in program.graph.nodes
    }


def _solved(program: Program, choices: Mapping[fx.Node, int]) -> tuple[Walk, Classes]:
    walk = Walk(program, choices)
    return walk, walk.labels.solve()


def _other_factors(walk: Walk, classes: Classes) -> dict[fx.Node, int]:
    """Splits whose channels end in a product of activations, as attention's do: the next factor, its heads, may do better."""
    summed = np.zeros(classes.number, bool)
    for ids in walk.contracted:
        summed[classes.of[ids]] = True
    return {
        node: 1
        for node, (_, ids) in walk.splits.items()
        if summed[classes.of[ids]].any() or _frozen(ids, classes)
    }


def _frozen(ids: Ids, classes: Classes) -> bool:
    return bool((~classes.is_free(classes.of[ids])).all())


def _axes(walk: Walk) -> Iterator[Ids]:
    """The labels of every axis of every value and parameter, each once."""
    seen: set[int] = set()
    values = [*walk.parameters.values(), *walk.values.values()]
    for dimension in pytree.tree_leaves(values):
        if isinstance(dimension, Axis) and dimension.is_named and id(dimension.ids) not in seen:
            seen.add(id(dimension.ids))
            yield dimension.ids
    yield from walk.per_group.values()


def _add_groups(coupling: Coupling, found: Partition) -> Ids:
    """Give ``coupling`` the groups that have a choice, in the order of the program; which group each class is of."""
    walk, classes = coupling.walk, coupling.classes
    order = np.argsort(found.group, kind="stable")
    order = order[found.group[order] >= 0]
    starts = np.flatnonzero(np.diff(found.group[order], prepend=-1))
    made = np.zeros(classes.number, bool)
    for dimension in walk.layers.values():
        if isinstance(dimension, Axis):
            made[classes.of[dimension.ids]] = True
    candidates = np.split(order, starts[1:]) if len(order) else []
    sets = [s for s in candidates if made[s].all() and _has_choice(s, found)]
    group_of = np.full(classes.number, -1, np.int64)
    channel_of = np.full(classes.number, -1, np.int64)
    for number, members in enumerate(sets):
        group_of[members] = number
        channel_of[members] = np.arange(len(members))
    classes.freeze(np.flatnonzero(group_of < 0), _ALONE)
    members_of: list[list[Member]] = [[] for _ in sets]
    for member, number in _members(walk, classes, group_of, channel_of):
        members_of[number].append(member)
    layers = _by_group(walk.layers, classes, group_of, len(sets))
    readers = _by_group(walk.sources, classes, group_of, len(sets))
    coupling.groups = tuple(
        Group(
            coupling=coupling,
            size=len(set_),
            members=tuple(members_of[number]),
            layers=layers[number],
            readers=readers[number],
            block=torch.from_numpy(found.block[set_]),
            part=torch.from_numpy(found.part[set_]),
            classes=torch.from_numpy(set_),
        )
        for number, set_ in enumerate(sets)
    )
    return group_of


def _has_choice(members: Ids, found: Partition) -> bool:
    """True where a block has more channels than it must keep."""
    blocks = int(found.block[members].max()) + 1
    pairs = np.unique(np.stack([found.block[members], found.part[members]]), axis=1)
    return len(members) > int(np.bincount(pairs[0]).max()) * blocks


def _members(
    walk: Walk, classes: Classes, group_of: Ids, channel_of: Ids
) -> Iterator[tuple[Member, int]]:
    """A member for each parameter's axis and each group in it."""
    for dims in walk.parameters.values():
        for axis, dimension in enumerate(dims):
            if not isinstance(dimension, Axis) or not dimension.is_named:
                continue
            ((name, _),) = dimension.slots
            ids = dimension.ids
            if axis == 1 and name in walk.per_group:
                ids = walk.per_group[name]
            groups = group_of[classes.of[ids]]
            role, layer = walk.roles.get((name, axis), ("factor", None))
            node = walk.readers[name]
            for number in np.unique(groups[groups >= 0]).tolist():
                channel = np.where(groups == number, channel_of[classes.of[ids]], -1)
                reader = layer if layer is not None else next(iter(node.users))
                yield Member(node, role, axis, torch.from_numpy(channel), reader), number


def _by_group(
    table: Mapping[fx.Node, object], classes: Classes, group_of: Ids, number: int
) -> list[tuple[fx.Node, ...]]:
    found: list[list[fx.Node]] = [[] for _ in range(number)]
    for node, value in table.items():
        arrays = [value.ids] if isinstance(value, Axis) else value
        if isinstance(arrays, Fixed):
            continue
        groups = {int(g) for ids in arrays for g in np.unique(group_of[classes.of[ids]])}  # type: ignore[attr-defined]
        for group in groups - {-1}:
            found[group].append(node)
    return [tuple(nodes) for nodes in found]


def _explain(coupling: Coupling, group_of: Ids) -> None:
    """Each layer's share of free channels, and why the others are frozen."""
    classes = coupling.classes
    for node, dimension in coupling.walk.layers.items():
        if isinstance(dimension, Fixed):
            coupling.share[node] = 0.0
            coupling.frozen[node] = dimension.reason or "its output has no channels"
            continue
        held = classes.of[dimension.ids]
        free = group_of[held] >= 0
        coupling.share[node] = float(free.mean())
        if not free.all():
            coupling.frozen[node] = classes.reasons[int(classes.cause[held[~free][0]])]
