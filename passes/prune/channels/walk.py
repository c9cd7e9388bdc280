"""One walk over a program, in order: every value gets what is known of its axes (``labels.Axis`` or ``labels.Fixed``).

The rules (``layer_rules``, ``product_rules``, ``shape_rules``, ``part_rules``, ``pointwise_rules``) say what one operator does to axes. An operator without a rule freezes
every channel that touches it, so that an unknown operator is never pruned through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.passes.prune.channels.labels import (
    UNKNOWN,
    Axis,
    Dimension,
    Dimensions,
    Fixed,
    Ids,
    Labels,
    Rest,
    Slot,
)
from graphopt.program import Program

# What the masked network sets to zero; "input", "statistic" and "qparam" it leaves alone.
ZEROED = ("output", "bias", "scale", "shift", "factor")
SINGLE = Fixed("its layer has a single channel")
INPUT = Fixed("its channels meet an input of the network")

Rule = Callable[["Walk", fx.Node, dict[str, Any]], "Dimensions | list[Dimensions]"]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of the op table, or for overloads written ``aten.name.overload``."""

    def register(function: Rule) -> Rule:
        for name in names:
            targets = ops.BY_NAME[name].targets if name in ops.BY_NAME else (_overload(name),)
            RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def shape_of(value: fx.Node) -> list[int]:
    """A value's sizes, a symbolic one counted as its hint."""
    return ops._shape(value)


class Walk:
    """The state of one walk. ``choices`` says which factor of a split axis carries the channels, by node."""

    def __init__(self, program: Program, choices: Mapping[fx.Node, int]) -> None:
        self.program = program
        self.choices = choices
        self.labels = Labels()
        self.values: dict[fx.Node, Dimensions | list[Dimensions]] = {}
        self.parameters: dict[int, Dimensions] = {}
        self.readers: dict[str, fx.Node] = {}  # a parameter's name -> a node that reads it
        self.uses: Counter[str] = Counter()  # ... -> how many calls read it
        self.roles: dict[Slot, tuple[str, fx.Node]] = {}
        self.per_group: dict[str, Ids] = {}  # grouped weight -> labels [groups, inputs per group]
        self.layers: dict[fx.Node, Dimension] = {}
        self.sources: dict[fx.Node, list[Ids]] = {}  # a layer -> the labels that it reads
        self.splits: dict[fx.Node, tuple[int, Ids]] = {}  # choices there are, labels that carry
        self.contracted: list[Ids] = []
        self.folds: list[tuple[fx.Node, Ids, Rest]] = []
        self._constant: dict[fx.Node, bool] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            self.uses[str(node.target)] += len(node.users)
        for node in program.graph.nodes:
            self._visit(node)

    # what a rule asks

    def dims(self, value: Any) -> Dimensions:
        """The axes of a value."""
        found = self.values[value]
        assert not found or not isinstance(found[0], list)
        return list(found)  # type: ignore[arg-type]

    def is_constant(self, value: Any) -> bool:
        """True for a parameter or an expression of parameters alone."""
        return self._constant.get(value, False)

    # what a rule says

    def freeze(self, dimension: Dimension, reason: str) -> Fixed:
        """Keep all of an axis."""
        if isinstance(dimension, Axis):
            self.labels.freeze(dimension.ids, reason)
            return Fixed(reason)
        return dimension if dimension.reason else Fixed(reason)

    def tie(self, first: Dimension, second: Dimension, node: fx.Node) -> Dimension:
        """Channel i of both is removed together; where one axis is fixed, the other is frozen."""
        if isinstance(first, Axis) and isinstance(second, Axis):
            if not second.is_named:
                second.adopt(first.ids)
            elif not first.is_named:
                first.adopt(second.ids)
            else:
                self.labels.tie(first.ids, second.ids)
            return first
        for fixed, other in ((first, second), (second, first)):
            if isinstance(fixed, Fixed):
                reason = (
                    fixed.reason or f"its channels meet an axis that has no channels at {node.name}"
                )
                return self.freeze(other, reason)
        raise AssertionError

    def absorb(self, axis: Axis, node: fx.Node, foldable: bool = False) -> None:
        """``node`` sums over an axis: what a removed channel holds must be zero, or a number that a bias can take."""
        if axis.is_zero:
            return
        rest = axis.rest
        known = np.isfinite(rest)
        if foldable and known.all():
            self.folds.append((node, axis.ids, rest))
            return
        bad = np.flatnonzero(rest != 0)
        value = f"{rest[bad[0]]:.4g}" if known[bad[0]] else "a value that is not known"
        self.labels.freeze(
            axis.ids[bad], f"{node.name} would read {value}, not zero, from a removed channel"
        )

    def role(self, dimension: Dimension, role: str, node: fx.Node) -> None:
        """What the parameters behind an axis are to ``node``; being zeroed wins over not being zeroed."""
        if isinstance(dimension, Axis):
            for slot in dimension.slots:
                if slot not in self.roles or role in ZEROED:
                    self.roles[slot] = (role, node)

    def give_up(self, node: fx.Node, reason: str | None = None) -> Dimensions | list[Dimensions]:
        """Freeze everything that ``node`` reads; its outputs are fixed."""
        reason = reason or f"{_name(node)} ({node.name}) is not understood"
        for source in node.all_input_nodes:
            for dimension in pytree.tree_leaves(self.values.get(source, [])):
                self.freeze(dimension, reason)
        return self.fixed(node, reason)

    def fixed(self, node: fx.Node, reason: str | None = None) -> Dimensions | list[Dimensions]:
        """Fixed axes for every output of ``node``."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return _all_fixed(value, reason)
        if isinstance(value, list | tuple):
            return [_all_fixed(v, reason) for v in value]
        return []

    # the walk

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self.fixed(node, INPUT.reason)
        elif node.op == "get_attr":
            self.values[node] = self._parameter(node)
            self._constant[node] = True
        elif node.op == "output":
            self.give_up(node, "its channels are an output of the network")
        else:
            inputs = node.all_input_nodes
            self._constant[node] = bool(inputs) and all(map(self.is_constant, inputs))
            found = RULES.get(node.target)
            if found is None:
                found = _pointwise_rule(node)
            self.values[node] = self.give_up(node) if found is None else self._checked(found, node)

    def _checked(self, found: Rule, node: fx.Node) -> Dimensions | list[Dimensions]:
        """A rule's answer; an axis of one index, or of a size that varies, is fixed."""
        arguments = ops.bind(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        answer = found(self, node, arguments)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return answer
        assert len(answer) == value.dim(), f"{node.name}: {len(answer)} axes for {value.dim()}"
        return [
            self._sized(dimension, size, node)  # type: ignore[arg-type]
            for dimension, size in zip(answer, value.shape, strict=True)
        ]

    def _sized(self, dimension: Dimension, size: Any, node: fx.Node) -> Dimension:
        if isinstance(dimension, Fixed):
            return dimension
        if isinstance(size, torch.SymInt):
            return self.freeze(dimension, f"{node.name} joins its channels to the batch")
        assert dimension.size == size, f"{node.name}: {dimension.size} labels for {size} channels"
        if size == 1:
            return self.freeze(dimension, f"{node.name} is one channel alone")
        return dimension

    def _parameter(self, node: fx.Node) -> Dimensions:
        """Fresh axes for a tensor, the same for every name and node by which it is read."""
        tensor = self.program.tensor(node)
        name = str(node.target)
        self.readers.setdefault(name, node)
        if id(tensor) not in self.parameters:
            self.parameters[id(tensor)] = [
                Axis(self.labels, size, slots=frozenset({(name, axis)})) if size > 1 else SINGLE
                for axis, size in enumerate(tensor.shape)
            ]
        return self.parameters[id(tensor)]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else str(node.target)


def _all_fixed(value: Any, reason: str | None) -> Dimensions:
    return [Fixed(reason)] * (value.dim() if isinstance(value, torch.Tensor) else 0)


def _pointwise_rule(node: fx.Node) -> Rule | None:
    """The rule for operators that torch itself calls pointwise, random ones excepted."""
    tags = getattr(node.target, "tags", ())
    op = ops.info(node)
    is_pointwise = torch.Tag.pointwise in tags or (op is not None and op.elementwise)
    if is_pointwise and torch.Tag.nondeterministic_seeded not in tags:
        return RULES[POINTWISE]
    return None


POINTWISE = "pointwise"


def joined(parts: Iterable[Axis], labels: Labels) -> Axis:
    """Several axes end to end."""
    parts = list(parts)
    rest = np.concatenate([part.rest for part in parts])
    ids = np.concatenate([part.ids for part in parts])
    return Axis(labels, len(ids), ids, rest if rest.any() else None, _slots(parts))


def _slots(parts: Iterable[Axis]) -> frozenset[Slot]:
    return frozenset(slot for part in parts for slot in part.slots)


def same_rest(rests: NDArray[np.float64]) -> Rest | None:
    """Of several rests (rows) for one channel, the common one (None for zeros), NaN where they differ."""
    if not rests.any():
        return None
    first: Rest = rests[0]
    return np.where((rests == first).all(axis=0), first, UNKNOWN)
