"""Calls of ``ONE_TENSOR`` become nothing: their arguments are allocated as one tensor.

The kernels of the inputs of a concatenation each make "the whole tensor", of which they write their channels;
``ONE_TENSOR(a, b, ..., whole)`` says that these are the same memory. It is run after Relax has made allocations explicit
and before it plans them, so that the tensor lives from its first writer to its last reader.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

ONE_TENSOR = "graphopt.one_tensor"


def _is_marker(value: Any) -> bool:
    return (
        isinstance(value, tvm.ir.Call)
        and isinstance(value.op, relax.ExternFunc)
        and str(value.op.global_symbol) == ONE_TENSOR
    )


def _allocations(bindings: list[Any]) -> dict[Any, Any]:
    """Allocations that are to be another's memory, the earliest one's."""
    names: dict[Any, Any] = {}  # a variable -> the one it merely renames
    order: dict[Any, int] = {}
    for binding in bindings:
        order[binding.var] = len(order)
        if isinstance(binding.value, relax.Var):
            names[binding.var] = binding.value

    def origin(variable: Any) -> Any:
        while variable in names:
            variable = names[variable]
        return variable

    for binding in bindings:
        if _is_marker(binding.value):
            roots = {origin(argument) for argument in binding.value.args}
            earliest = min(roots, key=lambda root: order[root])
            names.update(dict.fromkeys(roots - {earliest}, earliest))
    allocated = {b.var for b in bindings if not isinstance(b.value, relax.Var)}
    return {variable: origin(variable) for variable in names if variable in allocated}


def _unified(function: relax.Function) -> relax.Function:
    first = _allocations([binding for block in function.body.blocks for binding in block.bindings])
    if not first:
        return function
    blocks = []
    for block in function.body.blocks:
        kept = [binding for binding in block.bindings if not _is_marker(binding.value)]
        blocks.append(
            relax.BindingBlock(
                [relax.VarBinding(b.var, first[b.var]) if b.var in first else b for b in kept]
            )
        )
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


@tvm.transform.module_pass(opt_level=0, name="UnifyTensors")  # type: ignore[untyped-decorator]
def unify_tensors(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """Apply to every Relax function."""
    for variable, function in list(module.functions.items()):
        if isinstance(function, relax.Function):
            module[variable] = _unified(function)
    return module
