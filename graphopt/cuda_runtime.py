"""The CUDA half of the TVM runtime: ``libtvm_runtime_cuda``, the driver's and CUDA's libraries, tensors on the device.

A compiled library holds a cubin, or CUDA source where it was compiled without ``nvcc``. TVM takes either for source and hands
it to a callback when the library is loaded: ours passes a cubin on as it is and compiles source for the device that is here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.backends.cuda.toolkit import INSTALL, compile_source, find_nvcc, image_in_text
from graphopt.errors import ArtifactError, TargetError
from graphopt.runtime import library_folders, tvm_runtime

Array = np.ndarray[Any, Any]

CUDA = 2  # DLPack's device type
_EXISTS, _COMPUTE_VERSION = 0, 4  # of TVM's device attributes
_CALLBACK = "tvm_callback_cuda_compile"
CUDART = "libcudart.so.13"  # CUDA's runtime
_LIBRARIES = (CUDART, "libcuda.so.1")  # and the driver
_LOCK = threading.Lock()


def package_libraries() -> list[Path]:
    """Folders of CUDA libraries that came as Python packages, as PyTorch's do."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec is not None else ()
    return [folder for root in roots for folder in sorted(Path(root).glob("*/lib"))]


def _preload(name: str) -> None:
    """Map a library where the loader finds it by name afterwards; leave its absence to who needs it."""
    for place in (name, *(str(folder / name) for folder in package_libraries())):
        try:
            ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


@functools.cache
def load_runtime() -> Any:
    """``tvm_ffi`` with TVM's CUDA runtime. Raises TargetError where a library that it needs is missing."""
    tvm_ffi = tvm_runtime()
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

    for name in _LIBRARIES:
        _preload(name)
    try:
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_GLOBAL", extra_lib_paths=library_folders())
    except (OSError, RuntimeError) as error:
        raise TargetError(
            f"the model is compiled for a GPU and CUDA cannot be used here ({error}); install NVIDIA's driver (libcuda.so.1) "
            "and the package nvidia-cuda-runtime of CUDA 13 (libcudart.so.13)"
        ) from error
    return tvm_ffi


def check_device(arch: str, source: str) -> None:
    """Raise TargetError unless device 0 runs code for ``arch``: the same major version, no older minor one."""
    attribute = load_runtime().get_global_func("runtime.GetDeviceAttr")
    if not attribute(CUDA, 0, _EXISTS):
        raise TargetError(f"{source} is compiled for {arch} and this machine has no NVIDIA GPU")
    version = str(attribute(CUDA, 0, _COMPUTE_VERSION))
    have, want = (tuple(map(int, v)) for v in (version.split("."), (arch[3:-1], arch[-1])))
    if have[0] != want[0] or have[1] < want[1]:
        raise TargetError(
            f"{source} is compiled for {arch} and this GPU is sm_{version.replace('.', '')}; compile the model for it"
        )


def device_code(code: str, arch: str) -> bytes:
    """The cubin in a library, compiled now where it holds source. Raises ArtifactError where nothing can compile it."""
    image = image_in_text(code)
    if image is not None:
        return image
    if find_nvcc() is None:
        raise ArtifactError(
            f"the model holds CUDA source for {arch} and nvcc was not found to compile it; {INSTALL}, "
            "or compile the model on a machine that has it"
        )
    return compile_source(code, arch)


@contextmanager
def device_code_for(arch: str) -> Iterator[None]:
    """While this is open, TVM's loader gets device code from ``device_code``; TVM's own callback is there again after it."""
    tvm_ffi = tvm_runtime()
    with _LOCK:
        before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
        tvm_ffi.register_global_func(_CALLBACK, lambda code: device_code(code, arch), override=True)
        try:
            yield
        finally:
            if before is None:
                tvm_ffi.registry.remove_global_func(_CALLBACK)
            else:
                tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def current_stream() -> int:
    """The CUDA stream on which this thread launches kernels; 0 is the default one."""
    tvm_ffi = tvm_runtime()
    return int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)))


def on_stream(stream: int | None) -> AbstractContextManager[Any]:
    """While this is open, this thread launches on a stream; None and 0 are the default one."""
    tvm_ffi = tvm_runtime()
    made: AbstractContextManager[Any] = tvm_ffi.use_raw_stream(
        tvm_ffi.device("cuda", 0), stream or 0
    )
    return made


class Device:
    """Tensors on device 0 of a kind; the copies wait for what runs before them."""

    def __init__(self, kind: str) -> None:
        tvm_ffi = tvm_runtime()
        self._ffi, self._place = tvm_ffi, tvm_ffi.device(kind, 0)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._read = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor on the device, of any values."""
        return self._allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._place, None)

    def tensor(self, array: Array) -> Any:
        """A copy of a contiguous, aligned array on the device."""
        made = self.empty(array.shape, str(array.dtype))
        self.fill(made, self._ffi.from_dlpack(array))
        return made

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy a contiguous tensor in the CPU's memory to one on the device."""
        self._copy(source, tensor)

    def array(self, tensor: Any) -> Array:
        """A copy of a tensor in NumPy's memory."""
        result = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._read(tensor, ctypes.c_void_p(result.ctypes.data), result.nbytes)
        return result
