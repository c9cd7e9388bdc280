"""Run a model compiled for a GPU: weights on the device, inputs copied there, outputs copied back.

``run_on_device`` is for callers whose tensors are on the device already, and for measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.cuda_runtime import CUDA, Device, check_device, device_code_for, load_runtime
from graphopt.runtime import tvm_runtime
from graphopt.session import CPU, POOLED, Array, Compiled, Machine, Session, map_library
from graphopt.weights_file import aligned_empty


class _DeviceMachine(Machine):
    """A virtual machine on a device and, for shapes, on the CPU."""

    devices = (CUDA, 0, POOLED, CPU, 0, POOLED)

    def __init__(self, device: Device, *rest: Any) -> None:
        super().__init__(*rest)
        self.device = device
        self._tensor = tvm_runtime().Tensor

    def run_tensors(self, tensors: Sequence[Any]) -> list[Any]:
        """Run the code on the device's tensors; it may be still running when this returns."""
        result = self.entry(*tensors, *self.weights)
        return [result] if isinstance(result, self._tensor) else list(result)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        tensors = [self.device.tensor(_aligned(array)) for array in arrays]
        return [self.device.array(output) for output in self.run_tensors(tensors)]


def _aligned(array: Array) -> Array:
    """A contiguous copy whose data begins where TVM's tensors may."""
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


class CudaSession(Session):
    """A ``Session`` on the first NVIDIA GPU. Raises TargetError where there is none, or one that cannot run the code."""

    def __init__(self, artifact: Compiled, threads: int | None = None) -> None:
        self._arch = str(artifact.manifest.report["device"]["arch"])
        load_runtime()
        check_device(self._arch, "the artifact")
        self._device = Device("cuda")
        super().__init__(artifact, threads)
        self._on_device = self._machine()

    def _map(self, library: bytes) -> Any:
        with device_code_for(self._arch):
            return map_library(library)

    def _load(self, weights: Mapping[str, Array]) -> tuple[Any, ...]:
        return tuple(self._device.tensor(_aligned(weight)) for weight in weights.values())

    def _machine(self) -> _DeviceMachine:
        return _DeviceMachine(self._device, self.library, self.manifest, self._weights)

    def run_on_device(self, *tensors: Any) -> list[Any]:
        """The outputs for inputs that are on the device (DLPack), both in the manifest's order; without waiting for them.

        For one thread at a time: it always runs on the same virtual machine.
        """
        given = [tvm_runtime().from_dlpack(tensor) for tensor in tensors]
        return self._on_device.run_tensors(given)
