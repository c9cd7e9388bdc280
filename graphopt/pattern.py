"""Patterns: the expression a rule matches, written as that expression.

    def pattern(self, op):
        conv = op.conv2d(var("x"), const("w"), const("b", optional=True), name="conv")
        return op.batch_norm(conv, const("gamma"), const("beta"), const("mean"), const("variance"), name="bn")

Arguments stand in the operator's own order; those not written match anything, and a literal matches an equal one.
Commutative operators are tried both ways round. A variable used twice must match one node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import Decline
from graphopt.program import Program


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
    """Bind ``pattern`` with its outermost call at ``root``, or None."""
    found = Match(program, root)
    return found if _match_call(pattern, root, found) else None


def _match_call(pattern: Call, node: Any, found: Match) -> bool:
    if not ops.is_op(node, *pattern.operators):
        return False
    saved = dict(found._bound), list(found.nodes)
    if pattern.name is not None and not _bind(pattern.name, node, found):
        return False
    found.nodes.append(node)
    bound = ops.bind(node)
    names = list(bound)
    values = [bound[name] for name in names]
    if _match_arguments(pattern, names, values, found):
        return True
    op = ops.info(node)
    if op is not None and op.commutative and len(values) >= 2:
        found._bound, found.nodes = dict(saved[0]), [*saved[1], node]
        if pattern.name is not None:
            found._bound[pattern.name] = node
        values[0], values[1] = values[1], values[0]
        if _match_arguments(pattern, names, values, found):
            return True
    found._bound, found.nodes = saved
    return False


def _match_arguments(pattern: Call, names: list[str], values: list[Any], found: Match) -> bool:
    if len(pattern.args) > len(values):
        return False
    by_name = dict(zip(names, values, strict=True))
    wanted = [*zip(pattern.args, values, strict=False)]
    for name, argument in pattern.kwargs.items():
        if name not in by_name:
            return False
        wanted.append((argument, by_name[name]))
    return all(_match_value(argument, value, found) for argument, value in wanted)


def _match_value(pattern: Any, value: Any, found: Match) -> bool:
    if isinstance(pattern, Call):
        return _match_call(pattern, value, found)
    if isinstance(pattern, Var):
        return _bind(pattern.name, value, found)
    if isinstance(pattern, Const):
        if value is None:
            return pattern.optional and _bind(pattern.name, None, found)
        is_constant = isinstance(value, fx.Node) and value.op == "get_attr"
        return is_constant and _bind(pattern.name, value, found)
    return not isinstance(value, fx.Node) and bool(pattern == value)


def _bind(name: str, value: Any, found: Match) -> bool:
    if name not in found._bound:
        found._bound[name] = value
        return True
    known = found._bound[name]
    if isinstance(known, fx.Node) and isinstance(value, fx.Node):
        same_constant = known.op == value.op == "get_attr" and known.target == value.target
        return known is value or same_constant
    return bool(known == value)
