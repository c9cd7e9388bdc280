"""Record the planned Relax function as a straight line of kernel calls, for hosts without TVM's virtual machine.

Between ``StaticPlanBlockMemory`` and the passes that hide the plan in scratch arguments, ``main`` is a list of bindings:
allocations, renamings, reshapes (which are no code), and calls of kernels with their results passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.instrument import pass_instrument

from graphopt.straight_line import Call, StraightLine, Tensor
from graphopt.weights_file import ELEMENT_TYPES

_ALIGNMENT = 64  # of every piece of workspace
_LAST_WITH_WORKSPACES = "tirx.LowerTVMBuiltin"


class Recorder:
    """``record`` is a pass that changes nothing, ``workspaces`` an instrument of code generation; ``line()`` is what they saw."""

    def __init__(self) -> None:
        self._line = StraightLine()
        self._workspace = 0
        self._refused = ""
        self.record = tvm.transform.module_pass(self._record, opt_level=0, name="RecordLine")
        self.workspaces = _Workspaces(self._function)

    def line(self) -> StraightLine:
        """The line, or why there is none."""
        if self._refused and not self._line.refused:
            return StraightLine(refused=self._refused)
        return replace(self._line, workspace=self._workspace)

    def _record(self, module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        try:
            self._line = _Line(module["main"]).run()
        except _RefusedError as error:
            self._line = StraightLine(refused=str(error))
        return module

    def _function(self, name: str, function: Any) -> None:
        """Keep the largest workspace of any function, and refuse those that call back into TVM."""
        sizes: list[int] = []

        def visit(call: Any) -> None:
            operator = call.op.name if isinstance(call.op, tvm.ir.Op) else ""
            if operator == "tirx.TVMBackendAllocWorkspace":
                size = call.args[2]
                if isinstance(size, tvm.tirx.IntImm):
                    sizes.append(-(-int(size) // _ALIGNMENT) * _ALIGNMENT)
                else:
                    self._refused = f"operator {name!r} asks for memory of a size that is known only when it runs"
            elif operator == "tirx.tvm_call_packed_lowered":
                self._refused = f"operator {name!r} calls {call.args[0].value} of TVM's runtime"

        tvm_ffi.structural_walk(function.body, (tvm.ir.Call, visit))
        self._workspace = max(self._workspace, sum(sizes))


@pass_instrument
class _Workspaces:
    """Shows every function to ``visit`` once its workspaces are calls."""

    def __init__(self, visit: Callable[[str, Any], None]) -> None:
        self.visit = visit

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        if str(info.name) == _LAST_WITH_WORKSPACES:
            for variable, function in module.functions.items():
                if isinstance(function, tvm.tirx.PrimFunc):
                    self.visit(str(variable.name_hint), function)


class _RefusedError(Exception):
    """The function is no straight line; the message is a clause that names the operator."""


@dataclass(frozen=True)
class _Unplaced:
    """A tensor without a place: its size is known only when the code runs, or a line has no word for its elements."""

    cause: str


class _Line:
    """Reads the bindings of one function.

    A value is the number of a tensor, a tuple of values, a storage's number in a list, or ``_Unplaced``.
    """

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.values: dict[Any, Any] = {}
        self.storages: list[int] = []
        self.results: list[int] = []
        self.tensors: list[Tensor] = []
        self.numbers: dict[Tensor, int] = {}
        self.calls: list[Call] = []

    def run(self) -> StraightLine:
        inputs = int(self.function.attrs["num_input"])
        for number, parameter in enumerate(self.function.params):
            memory, index = ("input", number) if number < inputs else ("weight", number - inputs)
            dtype = str(parameter.ty.dtype).replace("T.", "")
            self.values[parameter] = self._tensor(memory, index, 0, dtype, parameter.ty.shape)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._value(binding.value)
        outputs = self._value(self.function.body.body)
        leaves = outputs if isinstance(outputs, tuple) else (outputs,)
        for leaf in leaves:
            if isinstance(leaf, _Unplaced):
                raise _RefusedError(f"an output has {leaf.cause}")
        return StraightLine(
            tuple(self.storages),
            tuple(self.results),
            tuple(self.tensors),
            tuple(self.calls),
            leaves,
        )

    def _tensor(self, memory: str, index: int, offset: int, dtype: str, shape: Any) -> Any:
        sizes = _sizes(shape)
        if isinstance(sizes, _Unplaced):
            return sizes
        if dtype not in ELEMENT_TYPES:
            return _Unplaced(f"the element type {dtype}")
        tensor = Tensor(memory, index, offset, dtype, sizes)
        if tensor not in self.numbers:
            self.numbers[tensor] = len(self.tensors)
            self.tensors.append(tensor)
        return self.numbers[tensor]

    def _value(self, value: Any) -> Any:
        if isinstance(value, relax.Var):
            return self.values[value]
        if isinstance(value, relax.Tuple):
            return tuple(self._value(field) for field in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[int(value.index)]
        if isinstance(value, tvm.ir.Call):
            return self._call(value)
        kind = type(value).__name__
        raise _RefusedError(f"operator {kind!r} is no call of a kernel on tensors with a place")

    def _call(self, call: Any) -> Any:
        if isinstance(call.op, relax.ExternFunc):
            return self._kernel(str(call.op.global_symbol), call)
        if isinstance(call.op, tvm.ir.GlobalVar):
            return self._kernel(str(call.op.name_hint), call)
        name = str(call.op.name) if isinstance(call.op, tvm.ir.Op) else str(call.op)
        match name:
            case "relax.memory.alloc_storage":
                sizes = _sizes(call.args[0])
                if isinstance(sizes, _Unplaced):
                    return sizes
                self.storages.append(*sizes)
                return [len(self.storages) - 1]
            case "relax.memory.alloc_tensor":
                storage = self._value(call.args[0])
                if isinstance(storage, _Unplaced):
                    return _dynamic(call.args[2])
                dtype = str(call.args[3].value)
                return self._tensor("storage", storage[0], int(call.args[1]), dtype, call.args[2])
            case "relax.builtin.alloc_tensor":
                dtype = str(call.args[1].value)
                made = self._tensor("result", len(self.results), 0, dtype, call.args[0])
                if not isinstance(made, _Unplaced):
                    self.results.append(self.tensors[made].bytes)
                return made
            case "relax.reshape":
                source = self._value(call.args[0])
                if isinstance(source, _Unplaced):
                    return source
                tensor = self.tensors[source]
                place = tensor.memory, tensor.index, tensor.offset
                return self._tensor(*place, tensor.dtype, call.args[1])
        raise _RefusedError(f"operator {name!r} is none of a kernel, an allocation and a reshape")

    def _kernel(self, name: str, call: Any) -> None:
        arguments = []
        for argument in call.args:
            if isinstance(argument, tvm.ir.GenericConst):  # LiftConstants left it
                raise _RefusedError(f"operator {name!r} takes a constant of type {argument.ty}")
            if not isinstance(argument, relax.Var):
                kind = type(argument).__name__
                raise _RefusedError(f"operator {name!r} takes a {kind}, which is no tensor")
            value = self._value(argument)
            if isinstance(value, _Unplaced):
                raise _RefusedError(f"operator {name!r} takes {value.cause}")
            arguments.append(value)
        self.calls.append(Call(name, tuple(arguments)))


def _dynamic(shape: Any) -> _Unplaced:
    sizes = (getattr(size, "value", size) for size in shape)  # a number, or a symbol
    return _Unplaced(f"the dynamic shape [{', '.join(map(str, sizes))}]")


def _sizes(shape: Any) -> tuple[int, ...] | _Unplaced:
    """The numbers of a shape."""
    if shape is None:
        return _Unplaced("a shape of unknown rank")
    if not all(hasattr(value, "value") for value in shape):
        return _dynamic(shape)
    return tuple(int(value) for value in shape)
