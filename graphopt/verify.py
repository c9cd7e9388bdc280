"""The verifier: is this program well formed? Run on the result of every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.edit import fake_mode, propagate
from graphopt.errors import VerifyError
from graphopt.program import Program, attribute


def verify(program: Program) -> None:
    """Raise VerifyError, naming the node, unless the program is well formed.

    Checked: fx lint; every ``get_attr`` resolves to a tensor; no tensor that nothing reads; every node has provenance
    and the shape and dtype that fake tensors give it.
    """
    _check_tensors(program)
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerifyError(f"the graph is not well formed: {error}") from error
    mode = fake_mode(program)
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if "provenance" not in node.meta or "val" not in node.meta:
            missing = "provenance" if "provenance" not in node.meta else "shape"
            raise VerifyError(
                f"node {node.name!r} has lost its {missing}; make nodes with edit.build"
            )
        _check_value(node, propagate_checked(node, mode))


def propagate_checked(node: fx.Node, mode: Any) -> Any:
    """The node's fake value, or a VerifyError that names it."""
    try:
        return propagate(node, mode)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VerifyError(
            f"node {node.name!r} ({node.target}) does not accept its arguments: {reason}"
        ) from error


def _check_tensors(program: Program) -> None:
    used = set()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        used.add(str(node.target))
        try:
            value = attribute(program.graph_module, str(node.target))
        except AttributeError:
            value = None
        if not isinstance(value, torch.Tensor):
            raise VerifyError(
                f"node {node.name!r} reads {node.target!r}, which the program does not hold"
            )
    module = program.graph_module
    held = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    held += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in held:
        if name not in used:
            raise VerifyError(f"parameter {name!r} is read by no node")


def _check_value(node: fx.Node, fresh: Any) -> None:
    recorded = pytree.tree_leaves(node.meta["val"])
    for old, new in zip(recorded, pytree.tree_leaves(fresh), strict=True):
        if not isinstance(old, torch.Tensor):
            continue
        if old.dtype != new.dtype or not same_shape(old.shape, new.shape):
            raise VerifyError(
                f"node {node.name!r} is recorded as {describe(old)} but computes {describe(new)}"
            )


def same_shape(old: torch.Size, new: torch.Size) -> bool:
    if len(old) != len(new):
        return False
    return all(
        str(a) == str(b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else a == b
        for a, b in zip(old, new, strict=True)
    )


def check_same_interface(before: Program, after: Program) -> None:
    """Raise VerifyError where the inputs' or outputs' number, shapes or dtypes have changed."""
    for role, nodes_before, nodes_after in (
        ("input", before.inputs, after.inputs),
        ("output", _outputs(before), _outputs(after)),
    ):
        if len(nodes_before) != len(nodes_after):
            raise VerifyError(
                f"the program had {len(nodes_before)} {role}(s) and now has {len(nodes_after)}"
            )
        for index, (old, new) in enumerate(zip(nodes_before, nodes_after, strict=True)):
            a, b = old.meta["val"], new.meta["val"]
            if isinstance(a, torch.Tensor) and (
                a.dtype != b.dtype or not same_shape(a.shape, b.shape)
            ):
                raise VerifyError(
                    f"{role} {index} ({new.name!r}) was {describe(a)} and is now {describe(b)}"
                )


def _outputs(program: Program) -> list[fx.Node]:
    return [
        value for value in pytree.tree_leaves(program.output.args) if isinstance(value, fx.Node)
    ]


def describe(value: Any) -> str:
    """``float32[1, 3, 224, 224]``."""
    return f"{str(value.dtype).removeprefix('torch.')}{[str(s) if isinstance(s, torch.SymInt) else s for s in value.shape]}"
