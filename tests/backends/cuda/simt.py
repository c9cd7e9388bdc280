"""Run a CUDA ``PrimFunc`` without a GPU: every thread of the grid at once, as lanes of NumPy arrays.

What is interpreted is the very TIR that becomes CUDA, before any pass of TVM. Beyond the result it checks what a GPU would
not tell: indices outside a buffer, misaligned vectors, shared memory that one thread reads or overwrites in the same phase
between two barriers in which another wrote or read it, memory read before it was written or while a copy is on its way,
barriers that not every thread of a block reaches. The device functions of ``backends.cuda.device`` are defined in
``simt_functions`` by their documentation, not by their code.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from tests.backends.cuda import simt_functions
from tests.backends.cuda.simt_memory import Fault, Memory, Pointer, Storage

Array = np.ndarray[Any, Any]


def run(function: tirx.PrimFunc, *arrays: Array, asynchronous: bool = True) -> None:
    """Run the kernel on arguments whose results are written in place, copies to shared memory by ``cp.async`` or at once."""
    grid = _Grid(function, arrays)
    grid.asynchronous = asynchronous
    grid.run()


def run_lowered(
    function: tirx.PrimFunc, values: Sequence[int], blocks: Sequence[int], threads: Sequence[int]
) -> None:
    """Run what TVM has made of a kernel: ``values`` are addresses of memory and scalars, in the order of its parameters."""
    grid = _Grid(function, ())
    for parameter, value in zip(function.params, values, strict=True):
        (grid.addresses if _is_pointer(parameter) else grid.values)[parameter] = value
    grid.is_ours = str(function.attrs["global_symbol"]).startswith("cuda_")
    grid.run()
    launched = grid.size("blockIdx"), grid.size("threadIdx")
    if launched != (tuple(blocks), tuple(threads)):
        raise Fault(f"{blocks} blocks of {threads} threads are launched for {launched}")


def _is_pointer(parameter: Any) -> bool:
    return isinstance(parameter.ty, tvm.ir.PointerType)


def _uniform(value: Any, mask: Array, what: str) -> int:
    if np.ndim(value) == 0:
        return int(value)
    chosen = np.unique(value[mask])
    if len(chosen) != 1:
        raise Fault(f"{what} differs between threads: {chosen}")
    return int(chosen[0])


class _Grid(Memory):
    def __init__(self, function: tirx.PrimFunc, arrays: Sequence[Array]) -> None:
        super().__init__()
        self.function = function
        self.values: dict[Any, Any] = {}
        self.storages: dict[Any, Storage] = {}
        self.extents: dict[str, int] = {}
        self.addresses: dict[Any, int] = {}  # of pointer parameters
        for parameter, array in zip(function.params, arrays, strict=bool(arrays)):
            self._argument(parameter, array)

    def _argument(self, buffer: Any, array: Array) -> None:
        for size, extent in zip(array.shape, buffer.shape, strict=True):
            if isinstance(extent, tirx.Var):
                self.values.setdefault(extent, size)
            elif int(extent) != size:
                raise Fault(f"{buffer.name} is declared {buffer.shape} and given {array.shape}")
        assert str(array.dtype) == str(buffer.dtype), f"{buffer.name} is {buffer.dtype}"
        data = array.reshape(-1).view(np.uint8).reshape(1, -1)
        assert np.shares_memory(data, array)
        self.storages[buffer] = Storage(
            str(buffer.name), data, np.zeros(1, int), np.ones(data.shape, bool)
        )

    def run(self) -> None:
        self._count_lanes(self.function.body)
        blocks, threads = (math.prod(self.size(unit)) for unit in ("blockIdx", "threadIdx"))
        self.lanes, self.threads = blocks * threads, threads
        self.block = np.repeat(np.arange(blocks), threads)
        self.phase = np.zeros(blocks, int)
        for storage in self.storages.values():
            storage.copy_of_lane = np.zeros(self.lanes, int)
        self.mask = np.ones(self.lanes, bool)
        self._statement(self.function.body)
        if any(self.groups):
            raise Fault("the kernel ends with copies on their way")

    def size(self, unit: str) -> tuple[int, ...]:
        """The extents of the grid (``blockIdx``) or of a block (``threadIdx``)."""
        return tuple(self.extents.get(f"{unit}.{axis}", 1) for axis in "xyz")

    def _count_lanes(self, node: Any) -> None:
        if isinstance(node, tirx.SeqStmt):
            for statement in node.seq:
                self._count_lanes(statement)
        elif isinstance(node, tirx.AttrStmt):
            if node.attr_key == "thread_extent":
                self.extents[str(node.node.thread_tag)] = self._scalar(node.value)
            self._count_lanes(node.body)

    def _scalar(self, value: Any) -> int:
        return int(np.asarray(self._expression(value)).reshape(-1)[0])

    # statements

    def _statement(self, node: Any) -> None:
        getattr(self, f"_{type(node).__name__}")(node)

    def _SeqStmt(self, node: Any) -> None:
        for statement in node.seq:
            self._statement(statement)

    def _AttrStmt(self, node: Any) -> None:
        if node.attr_key == "thread_extent":
            unit, _, axis = str(node.node.thread_tag).partition(".")
            lane = np.arange(self.lanes)
            number = lane % self.threads if unit == "threadIdx" else lane // self.threads
            behind = math.prod(self.size(unit)[: "xyz".index(axis)])
            self.values[node.node.var] = number // behind % self.extents[f"{unit}.{axis}"]
        self._statement(node.body)

    def _AllocBuffer(self, node: Any) -> None:
        buffer = node.buffer
        size = int(np.prod([int(s) for s in buffer.shape])) * _item_bytes(buffer)
        shared = str(buffer.scope()).startswith("shared")
        copies = self.lanes // self.threads if shared else self.lanes
        data = np.full((copies, size), 0xCD, np.uint8)
        lane = self.block if shared else np.arange(self.lanes)
        written = np.zeros(data.shape, bool)
        self.storages[buffer] = Storage(str(buffer.name), data, lane, written, shared)

    def _DeclBuffer(self, node: Any) -> None:
        if node.data in self.addresses:
            self.storages[node.buffer] = self._memory(node.buffer, self.addresses[node.data])
        else:
            self.storages[node.buffer] = self.storages[node.data.args[0]]

    def _memory(self, buffer: Any, address: int) -> Storage:
        """The process's own memory from ``address`` on, as large as the buffer, or as its allocation.

        TVM declares buffers of a dynamic batch by variables that it does not pass to the device.
        """
        try:
            elements = math.prod(self._scalar(size) for size in buffer.shape)
            size = elements * _item_bytes(buffer)
        except KeyError:
            size = ctypes.CDLL(None).malloc_usable_size(ctypes.c_void_p(address))
        memory = (ctypes.c_uint8 * size).from_address(address)
        data = np.ctypeslib.as_array(memory).reshape(1, -1)
        return Storage(str(buffer.name), data, np.zeros(1, int), np.ones(data.shape, bool))

    def _Bind(self, node: Any) -> None:
        self.values[node.var] = self._expression(node.value)

    def _Evaluate(self, node: Any) -> None:
        self._expression(node.value)

    def _For(self, node: Any) -> None:
        if not self.mask.any():
            return
        start = _uniform(self._expression(node.min), self.mask, "a loop's start")
        extent = _uniform(self._expression(node.extent), self.mask, "a loop's extent")
        for i in range(start, start + extent):
            self.values[node.loop_var] = np.int32(i)
            self._statement(node.body)

    def _IfThenElse(self, node: Any) -> None:
        condition = np.broadcast_to(self._expression(node.condition), (self.lanes,)).astype(bool)
        outer = self.mask
        for taken, body in ((condition, node.then_case), (~condition, node.else_case)):
            self.mask = outer & taken
            if body is not None and self.mask.any():
                self._statement(body)
        self.mask = outer

    def _BufferStore(self, node: Any) -> None:
        dtype = _element(node.buffer)
        value = np.asarray(self._expression(node.value))
        offset, lanes = self._offset(node.buffer, node.indices)
        if value.ndim == 2:
            assert value.shape[1] == lanes
        value = np.broadcast_to(value.reshape(-1, lanes), (self.lanes, lanes)).astype(dtype)
        storage = self.storages[node.buffer]
        if offset.ndim == 2:  # elements apart, one by one
            for i in range(lanes):
                element = np.ascontiguousarray(value[:, i : i + 1])
                self.write(Pointer(storage, offset[:, i]), element.view(np.uint8))
            return
        self.write(Pointer(storage, offset), value.view(np.uint8))

    # memory

    def _offset(self, buffer: Any, indices: Any) -> tuple[Array, int]:
        """Bytes from the buffer's start, a lane each, and the elements from there on; of every element where they lie apart."""
        (index,) = indices
        size = _item_bytes(buffer)
        lanes = of_element = size // _element(buffer).itemsize
        if isinstance(index, tirx.Ramp):
            lanes = int(index.lanes) * of_element
            if int(index.stride) != 1:
                return self._expression(index).astype(np.int64) * size, lanes
            index = index.base
        offset = np.broadcast_to(self._expression(index), (self.lanes,)).astype(np.int64)
        return offset * size, lanes

    # expressions

    def _expression(self, node: Any) -> Any:
        if isinstance(node, int | float):
            return node
        kind = type(node).__name__
        binary = simt_functions.BINARY.get(kind)
        if binary is not None:
            with np.errstate(all="ignore"):
                return binary(self._expression(node.a), self._expression(node.b))
        return getattr(self, f"_{kind}")(node)

    def _IntImm(self, node: Any) -> Any:
        return np.dtype(_dtype(node)).type(int(node.value))

    def _FloatImm(self, node: Any) -> Any:
        return np.dtype(_dtype(node)).type(float(node.value))

    def _Broadcast(self, node: Any) -> Any:
        value = np.broadcast_to(self._expression(node.value), (self.lanes,))
        return np.repeat(value[:, None], int(node.lanes), axis=1)

    def _Ramp(self, node: Any) -> Any:
        base = np.broadcast_to(self._expression(node.base), (self.lanes,))
        return base[:, None] + np.arange(int(node.lanes)) * self._expression(node.stride)

    def _Var(self, node: Any) -> Any:
        return self.values[node]

    def _Cast(self, node: Any) -> Any:
        value = np.asarray(self._expression(node.value))
        target = np.dtype(_dtype(node).partition("x")[0])
        if value.dtype.kind == "f" and target.kind in "iu":
            return np.trunc(value).astype(np.int64).astype(target)
        return value.astype(target)

    def _Not(self, node: Any) -> Any:
        return ~np.asarray(self._expression(node.a))

    def _Let(self, node: Any) -> Any:
        self.values[node.var] = self._expression(node.value)
        return self._expression(node.body)

    def _Select(self, node: Any) -> Any:
        values = self._expression(node.true_value), self._expression(node.false_value)
        return np.where(self._expression(node.condition), *values)

    def _TensorLoad(self, node: Any) -> Any:
        dtype = _element(node.source)
        offset, lanes = self._offset(node.source, node.indices)
        storage = self.storages[node.source]
        if offset.ndim == 2:
            columns = [self.read(Pointer(storage, o), dtype.itemsize) for o in offset.T]
            return np.ascontiguousarray(np.concatenate(columns, axis=1)).view(dtype)
        data = self.read(Pointer(storage, offset), lanes * dtype.itemsize)
        value = np.ascontiguousarray(data).view(dtype)
        return value[:, 0] if lanes == 1 else value

    def _Call(self, node: Any) -> Any:
        name = str(getattr(node.op, "name", node.op))
        if name == "tirx.address_of":
            load = node.args[0]
            offset, _ = self._offset(load.source, load.indices)
            return Pointer(self.storages[load.source], offset)
        if name == "tirx.tvm_storage_sync":
            return self.barrier()
        if name == "prim.if_then_else":
            return self._if_then_else(*node.args)
        if name == "tirx.reinterpret":
            return self._reinterpret(node)
        arguments = list(node.args)
        if name in ("tirx.call_pure_extern", "tirx.cuda.func_call"):
            name = _text(arguments.pop(0))
            if str(node.op.name).endswith("func_call"):
                arguments.pop()  # the source
        values = [self._expression(argument) for argument in arguments]
        with np.errstate(all="ignore"):
            return simt_functions.call(self, name, values)

    def _if_then_else(self, condition: Any, when_true: Any, when_false: Any) -> Any:
        taken = np.broadcast_to(self._expression(condition), (self.lanes,)).astype(bool)
        outer = self.mask
        self.mask = outer & taken
        first = self._expression(when_true)
        self.mask = outer & ~taken
        second = self._expression(when_false)
        self.mask = outer
        return np.where(taken, first, second)

    def _reinterpret(self, node: Any) -> Any:
        value = np.asarray(self._expression(node.args[0]))
        if not value.ndim:  # the same for all threads
            value = np.broadcast_to(value, (self.lanes,))
        value = np.ascontiguousarray(value)
        element, _, lanes = _dtype(node).partition("x")
        rows = value.reshape(self.lanes, -1) if value.size % self.lanes == 0 else value
        result = np.ascontiguousarray(rows).view(np.dtype(element))
        return result if lanes else result[:, 0]


def _dtype(node: Any) -> str:
    kind = str(node.ty.dtype)
    return "bool" if kind == "bool" else kind


def _element(buffer: Any) -> np.dtype[Any]:
    """The scalar type of a buffer, whose elements may be vectors."""
    return np.dtype(str(buffer.dtype).partition("x")[0])


def _item_bytes(buffer: Any) -> int:
    return _element(buffer).itemsize * int(str(buffer.dtype).partition("x")[2] or 1)


def _text(value: Any) -> str:
    return str(value.value) if isinstance(value, tvm.ir.StringImm) else str(value)
