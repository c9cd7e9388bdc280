"""``results(x)``: tensors like the outputs of ``main(x, ...)``, for a session that fills them itself.

A CUDA graph writes its outputs to one place at every run, and a session hands out copies. TVM's pool is open to compiled
code only; an allocation outside of it (``cudaMalloc``) and its release would make the device wait.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

RESULTS = "results"


def _types(function: relax.Function) -> list[Any]:
    """The types of the outputs' tensors; none where a shape is not known from the inputs'."""
    result = function.ret_ty
    types = list(result.fields) if isinstance(result, tvm.ir.TupleType) else [result]
    inputs = function.params[: int(function.attrs["num_input"])]
    known = [size for parameter in inputs for size in parameter.ty.shape]
    for each in types:
        if not isinstance(each, relax.TensorType) or not isinstance(each.shape, relax.ShapeExpr):
            return []
        for variable in relax.analysis.free_symbolic_vars(each.shape):
            if not any(variable.same_as(size) for size in known):
                return []
    return types


@tvm.transform.module_pass(opt_level=0, name="AddResults")  # type: ignore[untyped-decorator]
def add_results(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """Apply to ``main`` after Relax has planned its memory and before it lowers the plan."""
    main = module["main"]
    types = _types(main)
    if not types:
        return module
    bindings = [
        relax.VarBinding(
            relax.Var(f"result_{i}", each),
            relax.op.builtin.alloc_tensor(each.shape, str(each.dtype), 0),
        )
        for i, each in enumerate(types)
    ]
    made = relax.Tuple([binding.var for binding in bindings])
    function = relax.Function(
        list(main.params[: int(main.attrs["num_input"])]),
        relax.SeqExpr([relax.BindingBlock(bindings)], made),
        tvm.ir.TupleType(types),
        is_pure=False,
    )
    module[RESULTS] = relax.utils.copy_with_new_vars(function).with_attr("global_symbol", RESULTS)
    return module
