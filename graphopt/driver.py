"""Runs a pass: a private copy, the rules, dead nodes removed, verified, measured, recorded."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from graphopt.choice import Choice
from graphopt.contract import Contract, difference
from graphopt.edit import Edit, sweep
from graphopt.errors import ContractError, Decline, GraphoptError, PassError, VerifyError
from graphopt.modes import is_training
from graphopt.pattern import Operators, match
from graphopt.program import Program, Record
from graphopt.rule import RewriteRule
from graphopt.verify import check_same_interface, verify

log = logging.getLogger(__name__)
_MOST_SWEEPS = 32


class Runnable(Protocol):
    """What the driver needs of a pass; ``graphopt.passing.Pass`` is what authors subclass."""

    name: ClassVar[str]

    def apply(self, edit: Edit) -> None: ...

    def promised(self) -> Contract: ...

    def measured(self) -> bool: ...


def run(pass_: Runnable, program: Program) -> Program:
    """``pass_`` applied to ``program``; see ``Pass.__call__``."""
    started = time.perf_counter()
    before = program.stats()
    edit = Edit(program.clone(), pass_.name)
    try:
        pass_.apply(edit)
        sweep(edit.program)
        edit.program.graph_module.recompile()
        verify(edit.program)
        check_same_interface(program, edit.program)
    except VerifyError as cause:
        raise _named(VerifyError(f"{pass_.name}: {cause}"), cause, edit) from cause
    except GraphoptError:
        raise
    except Exception as cause:
        wrapped = PassError(f"{pass_.name} failed: {type(cause).__name__}: {cause}")
        raise _named(wrapped, cause, edit) from cause
    error: float | None = 0.0
    if edit.rewrites:
        error = _measure(pass_, program, edit.program) if pass_.measured() else None
    after = edit.program.stats() if edit.rewrites else before
    record = Record(
        name=pass_.name,
        options=_options(pass_),
        contract=str(pass_.promised()),
        rewrites=edit.rewrites,
        declines=tuple(edit.declines),
        parameters=(before.parameters, after.parameters),
        macs=(before.macs, after.macs),
        error=error,
        seconds=time.perf_counter() - started,
        notes=tuple(edit.notes),
        layers=tuple(edit.layers),
    )
    log.info("%s: %d rewrites, %d declined", pass_.name, edit.rewrites, len(edit.declines))
    return edit.program.with_record(record)


def apply_rules(edit: Edit, rules: Sequence[RewriteRule]) -> None:
    """Try every rule at every node, sweep after sweep, until a sweep changes nothing."""
    patterns = [(rule, rule.pattern(Operators())) for rule in rules]
    for _ in range(_MOST_SWEEPS):
        edit.declines.clear()
        last: str | None = None
        for node in edit.nodes():
            if not node.users:
                continue
            for rule, pattern in patterns:
                found = match(edit.program, pattern, node)
                if found is not None and _rewrite(edit, rule, found):
                    last = f"{type(rule).__name__} at node {node.name!r}"
                    break
        sweep(edit.program)
        if last is None:
            return
    raise PassError(
        f"{edit.pass_name} reaches no fixed point: {last} still rewrites after {_MOST_SWEEPS} sweeps; "
        "let its check decline what it has already rewritten"
    )


def _rewrite(edit: Edit, rule: RewriteRule, found: Any) -> bool:
    try:
        rule.check(found)
    except Decline as reason:
        edit.decline(found.root, str(reason))
        return False
    new = rule.rewrite(edit.build(found.root, found.nodes), found)
    if not isinstance(new, fx.Node):
        raise PassError(
            f"{edit.pass_name}: {type(rule).__name__}.rewrite must return a node, not {type(new).__name__}"
        )
    edit.replace(found.root, new)
    return True


def _measure(pass_: Runnable, before: Program, after: Program) -> float | None:
    """The largest relative difference on the example inputs; None for a program in training mode."""
    if is_training(before.graph) or is_training(after.graph):
        return None
    with torch.no_grad():
        error = difference(before(*before.example_inputs), after(*before.example_inputs))
    contract = pass_.promised()
    if not contract.allows(error):
        raise ContractError(
            f"{pass_.name} promises {contract} but changed the output by {error:.3g} on the example inputs"
        )
    return error


def _options(pass_: Any) -> dict[str, Any]:
    """The options as JSON holds them; data (tensors, loaders) by their type."""
    values = {f: getattr(pass_, f.name) for f in dataclasses.fields(pass_)}
    return {
        # data is what a dataclass does not show: a list of batches is no list of options
        f.name: _plain(value) if f.repr or value is None else f"<{type(value).__name__}>"
        for f, value in values.items()
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Choice):
        return {name: _plain(options) for name, options in value.to_json().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and all(
        not isinstance(item, torch.Tensor) for item in value
    ):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _named(error: GraphoptError, cause: Exception, edit: Edit) -> GraphoptError:
    """``error`` with the part of the graph around the node that its message names."""
    nodes = [n for n in edit.graph.nodes if f"{n.name!r}" in str(cause)]
    for node in nodes[:1]:
        nearby = [*node.all_input_nodes, node, *node.users]
        error.add_note("\n".join(n.format_node() or n.name for n in nearby))
    return error
