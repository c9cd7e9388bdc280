"""Run a model compiled for a GPU: weights on the device, inputs copied there, outputs copied back.

``run_on_device`` is for callers whose tensors are on the device already, and for measuring. Kernels are launched one by one
the first time that inputs of some shape come, which loads their code, and as one CUDA graph from the second time on.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.cuda_graph import (
    CudaGraph,
    CudaGraphError,
    copy_on_device,
    is_capturing,
    recording_failed,
)
from graphopt.cuda_runtime import (
    CUDA,
    Device,
    check_device,
    device_code_for,
    load_runtime,
    on_stream,
)
from graphopt.errors import InputError
from graphopt.runtime import tvm_runtime
from graphopt.session import CPU, POOLED, Array, Compiled, Machine, Session, map_library
from graphopt.weights_file import aligned_empty

_LOG = logging.getLogger(__name__)

GRAPHS = 8  # shapes of which one machine keeps the graphs, those used last
RESULTS = "results"  # the function of a library that allocates tensors like the outputs


class _Launches(Machine):
    """A virtual machine on a device and, for shapes, on the CPU; it launches kernels one by one."""

    devices = (CUDA, 0, POOLED, CPU, 0, POOLED)

    def __init__(self, device: Device, *rest: Any) -> None:
        super().__init__(*rest)
        self.device = device

    def launch(self, tensors: Sequence[Any]) -> list[Any]:
        """Run the code on the device's tensors; it may be still running when this returns."""
        self.prepare(tensors)
        result = self.entry(*tensors, *self.weights, *self._scratch)
        return [result] if isinstance(result, self._tensor_class) else list(result)

    def prepare(self, tensors: Sequence[Any]) -> None:
        """Make the tensors between the kernels, where there are none for these shapes."""
        if self._allocate is not None:
            self._prepare([tuple(tensor.shape) for tensor in tensors], tensors)

    def run_on_device(self, tensors: Sequence[Any]) -> list[Any]:
        """The outputs, in tensors that nothing else writes to."""
        return self.launch(tensors)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        with on_stream(None):
            tensors = [self.device.tensor(_aligned(array)) for array in arrays]
            return [self.device.array(output) for output in self.launch(tensors)]


class _Recorded:
    """The network at one shape of its inputs as a CUDA graph, with the tensors that it reads and writes at every run."""

    def __init__(self, machine: _Launches, like: Sequence[Any]) -> None:
        self._allocate(machine, like)
        self._machine = machine  # for the tensors between the kernels
        self.graph = CudaGraph(lambda: machine.launch(self.inputs))
        self.outputs: list[Any] = self.graph.result

    def _allocate(self, machine: _Launches, like: Sequence[Any]) -> None:
        """Everything that the recording takes. There may be no memory for it, where kernels alone have enough."""
        device = machine.device
        try:
            self.inputs = [device.empty(tuple(t.shape), str(t.dtype)) for t in like]
            # The outputs' memory goes back to TVM's pool with the next result of this machine, and is there in the recording,
            # so that nothing is allocated then.
            machine.module[RESULTS](*self.inputs)
            machine.prepare(self.inputs)
        except Exception as error:
            raise recording_failed(error) from error


class _Switch:
    """Whether the machines of a session use CUDA graphs; off for all of them once one has failed."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def turn_off(self, error: CudaGraphError) -> None:
        _LOG.warning("kernels are launched one by one, not as a CUDA graph: %s", error)
        self.on = False


class _Graphs(_Launches):
    """Launches what it has recorded of the shapes that it has run before."""

    def __init__(self, switch: _Switch, *rest: Any) -> None:
        super().__init__(*rest)
        self._arguments = rest
        self._switch = switch
        self._known: OrderedDict[tuple[Any, ...], _Recorded | None] = OrderedDict()
        # none where the shapes of the outputs follow from values
        known = self.module.implements_function(RESULTS)
        self._results: Any = self.module[RESULTS] if known else None

    def _recorded(self, like: Sequence[Any]) -> _Recorded | None:
        """The graph for inputs of these shapes, made now where it is the second time that they come."""
        if not self._switch.on or self._results is None or is_capturing():
            return None
        shapes = tuple(tuple(tensor.shape) for tensor in like)
        found = self._known.get(shapes)
        if found is None and shapes in self._known:
            # first, so that the graph's tensors may take this memory
            self._scratch, self._shapes = (), None
            found = _Recorded(_Launches(*self._arguments), like)
        self._known[shapes] = found
        self._known.move_to_end(shapes)
        if len(self._known) > GRAPHS:
            self._known.popitem(last=False)
        return found

    def _replayed(
        self, like: Sequence[Any], fill: Callable[[Sequence[Any]], None]
    ) -> list[Any] | None:
        """The graph's outputs for the inputs that ``fill`` writes; None where kernels are to be launched."""
        try:
            recorded = self._recorded(like)
            if recorded is None:
                return None
            fill(recorded.inputs)
            recorded.graph.launch()
        except CudaGraphError as error:
            self._switch.turn_off(error)
            self._known.clear()
            return None
        return recorded.outputs

    def run_on_device(self, tensors: Sequence[Any]) -> list[Any]:
        def fill(places: Sequence[Any]) -> None:
            for tensor, place in zip(tensors, places, strict=True):
                copy_on_device(tensor, place)

        outputs = self._replayed(tensors, fill)
        if outputs is None:
            return super().run_on_device(tensors)
        given = list(self._results(*tensors))
        for output, tensor in zip(outputs, given, strict=True):
            copy_on_device(output, tensor)
        return given

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        def fill(places: Sequence[Any]) -> None:
            for take, array, place in zip(self.inputs, arrays, places, strict=True):
                self.device.fill(place, take.tensor(array))

        with on_stream(None):
            outputs = self._replayed(arrays, fill)
            if outputs is not None:
                return [self.device.array(output) for output in outputs]
        return super().run(arrays)


def _aligned(array: Array) -> Array:
    """A contiguous copy whose data begins where TVM's tensors may."""
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


class CudaSession(Session):
    """A ``Session`` on the first NVIDIA GPU. Raises TargetError where there is none, or one that cannot run the code.

    ``cuda_graphs``: replay the kernels of a shape as one CUDA graph from its second run on. Where that fails, the log says
    why and they are launched one by one.
    """

    def __init__(
        self, artifact: Compiled, threads: int | None = None, cuda_graphs: bool = True
    ) -> None:
        self._arch = artifact.manifest.gpu
        load_runtime()
        check_device(self._arch, "the artifact")
        self._device = Device("cuda")
        self._switch = _Switch(cuda_graphs)
        self._lock = threading.Lock()
        super().__init__(artifact, threads)

    def _map(self, library: bytes) -> Any:
        with device_code_for(self._arch):
            return map_library(library)

    def _load(self, weights: Mapping[str, Array]) -> tuple[Any, ...]:
        return tuple(self._device.tensor(_aligned(weight)) for weight in weights.values())

    def _machine(self) -> _Graphs:
        return _Graphs(self._switch, self._device, self.library, self.manifest, self._weights)

    @functools.cached_property
    def _on_device(self) -> _Graphs:
        return self._machine()

    def run_on_device(self, *tensors: Any) -> list[Any]:
        """The outputs for contiguous inputs on the device (DLPack), both in the manifest's order; without waiting for them.

        Raises InputError naming the argument; indices are not checked. Results of two calls share no memory. Calls from several
        threads are taken in turn, and must all be on one stream, the one that TVM launches on in their threads: memory of a
        dropped result is handed out again, to ``session(x)`` too, which is on the default stream.
        """
        given = self._positional(tuple(map(tvm_runtime().from_dlpack, tensors)), {})
        with self._lock:
            machine = self._on_device
            sizes: dict[str, int] = {}
            for take, tensor in zip(machine.inputs, given, strict=True):
                take.check_form(tensor, sizes)
                if tensor.device.dlpack_device_type() != CUDA or not tensor.is_contiguous():
                    where = f"{tensor.device}, shape {tensor.shape}, strides {tensor.strides}"
                    raise InputError(
                        f"argument {take.spec.name!r} is on {where}; it must be contiguous and on the GPU"
                    )
            return machine.run_on_device(given)
