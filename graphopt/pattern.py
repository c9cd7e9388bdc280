"""Patterns: the expression a rule matches, written as that expression.

    def pattern(self, op):
        conv = op.conv2d(var("x"), const("w"), const("b", optional=True), name="conv")
        return op.batch_norm(conv, const("gamma"), const("beta"), const("mean"), const("variance"), name="bn")

Arguments stand in the operator's own order; those not written match anything, and a literal matches an equal one.
Commutative operators are tried both ways round. A variable used twice must match one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import Decline
from graphopt.program import Program

Bound = dict[str, Any]
Nodes = tuple[fx.Node, ...]
Step = tuple[Bound, Nodes]


@dataclass(frozen=True)
class Var:
    """Matches any value."""

    name: str


@dataclass(frozen=True)
class Const:
    """Matches a parameter or buffer of the program; None too where ``optional``."""

    name: str
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """Matches a call of one of the named operators."""

    operators: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str | None = None


def var(name: str) -> Var:
    """Any node or value, bound to ``name``."""
    return Var(name)


def const(name: str, optional: bool = False) -> Const:
    """A parameter or buffer, bound to ``name``; with ``optional``, None where the call has none."""
    return Const(name, optional)


class Operators:
    """``op.conv2d(...)`` makes a pattern of the op table's operator of that name; ``op.any("relu", "relu6")(...)`` of several."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return self.any(name)

    def any(self, *names: str) -> Callable[..., Call]:
        unknown = [name for name in names if name not in ops.BY_NAME]
        if unknown:
            raise AttributeError(f"no operator {unknown[0]!r} in the op table")

        def make(*args: Any, name: str | None = None, **kwargs: Any) -> Call:
            return Call(names, args, kwargs, name)

        return make


class Match:
    """One place where a pattern fits: ``match["x"]`` is what a name is bound to."""

    def __init__(self, program: Program, root: fx.Node) -> None:
        self.program = program
        self.root = root
        self.nodes: list[fx.Node] = []
        self._bound: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self._bound[name]

    def __contains__(self, name: str) -> bool:
        return self._bound.get(name) is not None

    def argument(self, name: str, argument: str) -> Any:
        """An argument of a matched call, by its schema name (defaults filled in)."""
        return ops.bind(self._bound[name])[argument]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor that a matched constant holds."""
        return self.program.tensor(self._bound[name]).detach()

    def shape(self, name: str) -> torch.Size:
        """The shape of a matched value (sizes may be symbolic)."""
        return self._bound[name].meta["val"].shape  # type: ignore[no-any-return]

    def sole_use(self, name: str) -> None:
        """Decline unless the matched value is read once."""
        node = self._bound[name]
        if len(node.users) != 1:
            self.decline(f"{node.name} is read {len(node.users)} times")

    def unshared(self, name: str) -> None:
        """Decline where a matched constant is read by another layer too."""
        self.unshared_parameter(self._bound[name])

    def unshared_parameter(self, parameter: fx.Node) -> None:
        """``unshared`` for a ``get_attr`` node; a tensor held under two names counts as one."""
        tensor = self.program.tensor(parameter)
        uses = 0
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and self.program.tensor(node) is tensor:
                uses += len(node.users)
        if uses != 1:
            self.decline(f"parameter {parameter.target} is shared by {uses} layers")

    def decline(self, reason: str) -> NoReturn:
        """Leave this place as it is, for a reason that the user will read."""
        raise Decline(reason)


def match(program: Program, pattern: Call, root: fx.Node) -> Match | None:
    """Bind ``pattern`` with its outermost call at ``root``, or None. Every order of commutative operators is tried."""
    for bound, nodes in _match_call(pattern, root, {}, ()):
        found = Match(program, root)
        found._bound, found.nodes = bound, list(nodes)
        return found
    return None


def _match_call(pattern: Call, node: Any, bound: Bound, nodes: Nodes) -> Iterator[Step]:
    if not ops.is_op(node, *pattern.operators):
        return
    if pattern.name is not None:
        named = _bind(pattern.name, node, bound)
        if named is None:
            return
        bound = named
    values = ops.bind(node)
    yield from _match_arguments(pattern, values, bound, (*nodes, node))
    op = ops.info(node)
    if op is not None and op.commutative:
        first, second, *rest = values
        swapped = {first: values[second], second: values[first]}
        swapped.update((name, values[name]) for name in rest)
        yield from _match_arguments(pattern, swapped, bound, (*nodes, node))


def _match_arguments(
    pattern: Call, values: dict[str, Any], bound: Bound, nodes: Nodes
) -> Iterator[Step]:
    if len(pattern.args) > len(values) or not pattern.kwargs.keys() <= values.keys():
        return
    wanted = list(zip(pattern.args, values.values(), strict=False))
    wanted.extend((argument, values[name]) for name, argument in pattern.kwargs.items())
    yield from _match_all(wanted, bound, nodes)


def _match_all(wanted: list[tuple[Any, Any]], bound: Bound, nodes: Nodes) -> Iterator[Step]:
    if not wanted:
        yield bound, nodes
        return
    for step in _match_value(*wanted[0], bound, nodes):
        yield from _match_all(wanted[1:], *step)


def _match_value(pattern: Any, value: Any, bound: Bound, nodes: Nodes) -> Iterator[Step]:
    if isinstance(pattern, Call):
        yield from _match_call(pattern, value, bound, nodes)
        return
    if isinstance(pattern, Var | Const):
        named = _bind(pattern.name, value, bound)
        if named is not None and (isinstance(pattern, Var) or _is_constant(pattern, value)):
            yield named, nodes
    elif not isinstance(value, fx.Node) and bool(pattern == value):
        yield bound, nodes


def _is_constant(pattern: Const, value: Any) -> bool:
    if value is None:
        return pattern.optional
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _bind(name: str, value: Any, bound: Bound) -> Bound | None:
    """``bound`` with the name, or None where it is bound to something else."""
    if name not in bound:
        return {**bound, name: value}
    known = bound[name]
    if isinstance(known, fx.Node) and isinstance(value, fx.Node):
        same_constant = known.op == value.op == "get_attr" and known.target == value.target
        return bound if known is value or same_constant else None
    return bound if bool(known == value) else None
