"""Constants between the kernels become parameters of ``main``, behind its weights: data is in one place of a file.

``main(x, w)`` that reads a folded table (a relative position bias, indices of a gather) becomes ``main(x, w, table)``.
Constants of an element type that no file of weights holds (bfloat16) stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import numpy as np
import tvm
from tvm import relax

from graphopt.weights_file import ELEMENT_TYPES


class LiftConstants:
    """A pass, and in ``lifted`` the arrays of the parameters that it added, by their names, none of which is ``taken``."""

    def __init__(self, taken: Collection[str]) -> None:
        self._taken = taken
        self.lifted: dict[str, np.ndarray[Any, Any]] = {}
        self._parameters: dict[Any, relax.Var] = {}
        self.apply = tvm.transform.module_pass(self._apply, opt_level=0, name="LiftConstants")

    def _apply(self, module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        main = module["main"]
        blocks = [
            relax.BindingBlock([self._binding(binding) for binding in block.bindings])
            for block in main.body.blocks
        ]
        if self._parameters:
            module["main"] = relax.Function(
                [*main.params, *self._parameters.values()],
                relax.SeqExpr(blocks, main.body.body),
                main.ret_ty,
                main.is_pure,
                main.attrs,
            )
        return module

    def _binding(self, binding: Any) -> Any:
        if not isinstance(binding, relax.VarBinding):
            return binding
        return relax.VarBinding(binding.var, self._lifted(binding.value))

    def _lifted(self, value: Any) -> Any:
        """The expression with parameters for its constant tensors."""
        if isinstance(value, tvm.ir.GenericConst) and isinstance(value.ty, relax.TensorType):
            held = str(value.ty.dtype).replace("T.", "") in ELEMENT_TYPES
            return self._parameter(value) if held else value
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._lifted(field) for field in value.fields])
        if isinstance(value, tvm.ir.Call):
            arguments = [self._lifted(argument) for argument in value.args]
            if not all(new.same_as(old) for new, old in zip(arguments, value.args, strict=True)):
                return relax.Call(value.op, arguments, value.attrs, value.ty_args)
        return value

    def _parameter(self, constant: Any) -> relax.Var:
        known = self._parameters.get(constant)
        if known is not None:
            return known
        names = (f"constant_{number}" for number in itertools.count())
        name = next(n for n in names if n not in self._taken and n not in self.lifted)
        self.lifted[name] = constant.value.numpy()
        self._parameters[constant] = relax.Var(name, constant.ty)
        return self._parameters[constant]
