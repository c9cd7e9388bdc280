"""CUDA graphs: kernels recorded once and launched together, by CUDA's own runtime library.

What is launched on a stream in capture does not run, it becomes nodes of a graph with the addresses that it was given
(CUDA C++ programming guide, "CUDA Graphs"): whoever replays it keeps those tensors, and puts new inputs into them.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

from graphopt.cuda_runtime import CUDART, current_stream, on_stream

# cudaStreamNonBlocking: work on the default stream does not break the capture off
_NON_BLOCKING = 1
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: this and other threads may allocate and wait meanwhile
_DEFAULT_KIND = 4  # cudaMemcpyDefault: from where to where follows from the addresses
_FUNCTIONS = (
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaStreamBeginCapture",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamIsCapturing",
)


class CudaGraphError(RuntimeError):
    """CUDA's runtime cannot record or replay; the message is a clause."""


@functools.cache
def _library() -> ctypes.CDLL:
    """CUDA's runtime. Raises CudaGraphError where it has no graphs."""
    try:
        library = ctypes.CDLL(CUDART)
        functions = [getattr(library, name) for name in _FUNCTIONS]
    except (OSError, AttributeError) as error:
        raise CudaGraphError(f"CUDA's runtime has no graphs ({error})") from error
    functions[0].restype = ctypes.c_char_p
    return library


def _call(function: str, *arguments: Any) -> None:
    library = _library()
    code = getattr(library, function)(*arguments)
    if code:
        library.cudaGetLastError()  # or the next one who asks takes it for his own
        what = library.cudaGetErrorString(code).decode(errors="replace")
        raise CudaGraphError(f"{function}: {what}")


def is_capturing() -> bool:
    """True while somebody else records what this thread launches, as ``torch.cuda.graph`` does."""
    stream, status = current_stream(), ctypes.c_int()
    if not stream:
        return False  # CUDA captures no default stream
    _call("cudaStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
    return bool(status.value)


def copy_on_device(source: Any, target: Any) -> None:
    """Copy a tensor on the calling thread's stream, without waiting; both contiguous and of one size."""
    size = source.numel() * source.dtype.itemsize
    if size:
        places = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (target, source))
        stream = ctypes.c_void_p(current_stream())
        _call("cudaMemcpyAsync", *places, ctypes.c_size_t(size), _DEFAULT_KIND, stream)


class CudaGraph:
    """What ``work`` launches, recorded and not run; ``result`` is what it returned.

    Raises CudaGraphError, also where ``work`` does what no graph can hold, such as to wait for the device.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        stream, graph, executable = (ctypes.c_void_p() for _ in range(3))
        _call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        try:
            self.result = _captured(stream, work, graph)
            flags = ctypes.c_ulonglong(0)
            _call("cudaGraphInstantiate", ctypes.byref(executable), graph, flags)
        finally:
            if graph:
                _library().cudaGraphDestroy(graph)
            _library().cudaStreamDestroy(stream)
        self._executable = executable
        # CUDA defers this until a launch that is still running has ended
        weakref.finalize(self, _library().cudaGraphExecDestroy, executable).atexit = False

    def launch(self) -> None:
        """Run it on the calling thread's stream, without waiting."""
        _call("cudaGraphLaunch", self._executable, ctypes.c_void_p(current_stream()))


def recording_failed(error: Exception) -> CudaGraphError:
    """The error of a graph that something else, of TVM, keeps from being."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return CudaGraphError(f"recording failed: {last[0]}")


def _captured(stream: ctypes.c_void_p, work: Callable[[], Any], graph: ctypes.c_void_p) -> Any:
    """Run ``work`` while what it launches becomes ``graph``; whatever happens, the capture is ended."""
    _call("cudaStreamBeginCapture", stream, _RELAXED)
    try:
        with on_stream(stream.value):
            result = work()
    except BaseException as error:
        _library().cudaStreamEndCapture(stream, ctypes.byref(graph))
        _library().cudaGetLastError()
        if not isinstance(error, Exception):
            raise
        raise recording_failed(error) from error
    _call("cudaStreamEndCapture", stream, ctypes.byref(graph))
    return result
