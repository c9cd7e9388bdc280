"""What a session takes and gives, as the manifest writes it: shapes, element types, nesting."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import CompileError
from graphopt.index_bounds import index_bounds
from graphopt.manifest import Dim, TensorSpec
from graphopt.program import Program
from graphopt.weights_file import ELEMENT_TYPES


def _spec(node: Any, program: Program) -> TensorSpec:
    value = node.meta["val"]
    low, high = program.dynamic_batch or (1, None)
    shape = tuple(
        Dim(str(s), low, high) if isinstance(s, torch.SymInt) else int(s) for s in value.shape
    )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in ELEMENT_TYPES:
        kind = "input" if node.op == "placeholder" else "output"
        raise CompileError(
            f"{kind} {node.name!r} is {dtype}, which NumPy has no type for; convert it in the model, with .float() say"
        )
    return TensorSpec(node.name, dtype, shape)


def input_specs(program: Program, unaligned: frozenset[str]) -> tuple[TensorSpec, ...]:
    """Those of the inputs; the tensors called ``unaligned`` may start at any element."""
    rows, specs = index_bounds(program), []
    for node in program.inputs:
        spec = dataclasses.replace(_spec(node, program), below=rows.get(node.name))
        if spec.name in unaligned:
            spec = dataclasses.replace(spec, alignment=node.meta["val"].element_size())
        specs.append(spec)
    return tuple(specs)


def output_specs(program: Program) -> tuple[TensorSpec, ...]:
    """Those of the output's tensors, in the order of its leaves."""
    leaves = pytree.tree_leaves(program.output.args[0])
    return tuple(_spec(leaf, program) for leaf in leaves if isinstance(leaf, torch.fx.Node))


def check_signature(program: Program) -> None:
    """Raise CompileError for inputs and outputs that no manifest holds."""
    input_specs(program, frozenset())
    output_specs(program)
    output_structure(program)


def output_structure(program: Program) -> Any:
    """The output's nesting as the manifest writes it: an index for a tensor, containers around it."""
    leaves = pytree.tree_leaves(program.output.args[0])
    numbers = iter(range(len(leaves)))
    flat = [
        next(numbers) if isinstance(leaf, torch.fx.Node) else {"value": leaf} for leaf in leaves
    ]
    codegen = program.graph._codegen
    spec = codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    if spec is None:
        return flat[0] if len(flat) == 1 else {"tuple": flat}
    return _nested(pytree.tree_unflatten([_Leaf(item) for item in flat], spec))


@dataclass(frozen=True)
class _Leaf:
    item: Any


def _nested(value: Any) -> Any:
    if isinstance(value, _Leaf):
        return value.item
    if isinstance(value, dict):
        return {"dict": [[str(key), _nested(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_nested(item) for item in value]}
    if isinstance(value, list):
        return {"list": [_nested(item) for item in value]}
    raise CompileError(
        f"an output of type {type(value).__name__} cannot be stored; return tensors, tuples, lists or dicts"
    )
