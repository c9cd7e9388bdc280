"""A Relax module and CUDA kernels become one shared library: host code by LLVM, device code as a cubin or as CUDA source.

TVM writes CUDA source into the library's blob for the loading side to compile. Its hook on that source puts the cubin of
nvcc there instead, which the loading side passes on as it is (``graphopt.cuda_runtime``): so no CUDA runtime is needed here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.backend.cuda import pipeline as stages
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.results import add_results
from graphopt.backends.cuda.toolkit import compile_source, find_nvcc, image_as_text
from graphopt.backends.link import linker
from graphopt.backends.lower.pipeline import relax_pipeline
from graphopt.errors import CompileError

_HOOK = "tvm_callback_cuda_postproc"
_NO_RUNTIME = "TVM_COMPILE_FORCE_FALLBACK"  # read at every build
_PIPELINE = "graphopt_cuda"
_OURS = "graphopt.kernel"


@dataclass(frozen=True)
class Library:
    """The bytes of ``model.so``, the form of the device code in it ("cubin" or "source"), and its CUDA source."""

    data: bytes
    code: str
    source: str


def target_of(arch: Arch, triple: str) -> tvm.target.Target:
    """TVM's target; dlight reads the limits."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": arch.shared_bytes}
    cuda = {"kind": "cuda", "arch": arch.name, "thread_warp_size": arch.warp, **limits}
    return tvm.target.Target(cuda, host={"kind": "llvm", "mtriple": triple})


def _lower() -> tuple[Any, Any, Any]:
    """TVM's passes on scheduled functions, and fewer on our kernels.

    ``CompactBufferAllocation`` cuts a buffer to what is indexed: the registers behind the address of a fragment's first one
    would lie outside. It also takes ten times as long as all others (9 s for one convolution of 12 s).
    """
    theirs, host, device = get_tir_pipeline("s_tir")
    ours, *_ = get_tir_pipeline("tirx")

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        def is_ours(function: Any) -> bool:
            return bool(function.attrs and _OURS in function.attrs)

        kernels = tvm.tirx.transform.Filter(is_ours)(module)
        rest = tvm.tirx.transform.Filter(lambda function: not is_ours(function))(module)
        result = ours(kernels) if kernels.functions else kernels
        if rest.functions:
            result.update(theirs(rest))
        return result

    return run, host, device


class _Device:
    """What TVM's hook is called with, and what it gives back."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.source = ""
        self.code = "source" if find_nvcc() is None else "cubin"

    def __call__(self, source: str, _: Any) -> str:
        self.source = str(source)
        if self.code == "source":
            return self.source
        return image_as_text(compile_source(self.source, self.arch.name))


@contextmanager
def _hooked(device: _Device) -> Iterator[None]:
    """TVM asks ``device`` for the code, and leaves it alone where there is a GPU to compile it for, too."""
    before = os.environ.get(_NO_RUNTIME)
    os.environ[_NO_RUNTIME] = "1"
    tvm_ffi.register_global_func(_HOOK, device, override=True)
    try:
        yield
    finally:
        tvm_ffi.registry.remove_global_func(_HOOK)
        del os.environ[_NO_RUNTIME]
        if before is not None:
            os.environ[_NO_RUNTIME] = before


def build_library(
    module: tvm.IRModule, functions: Mapping[str, Any], arch: Arch, triple: str
) -> Library:
    """Compile the Relax module and the kernels it calls. Raises CompileError."""
    target = target_of(arch, triple)
    register_tir_pipeline(_PIPELINE, _lower)
    device = _Device(arch)
    marked = {name: function.with_attr(_OURS, True) for name, function in functions.items()}
    pipeline = relax_pipeline(stages, target, marked, after_plan=(add_results,))
    try:
        with tvm.transform.PassContext(opt_level=3), _hooked(device):
            executable = relax.build(
                module, target, relax_pipeline=pipeline, tir_pipeline=_PIPELINE
            )
    except CompileError:
        raise
    except Exception as error:
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CompileError(f"TVM cannot compile the network for {arch.name}: {last[0]}") from error
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.so"
        try:
            executable.export_library(str(path), fcompile=linker(triple), options=["-s"])
        except RuntimeError as error:
            raise CompileError(
                "the compiled network could not be linked: install a C++ compiler (g++ or clang++) and try again"
            ) from error
        return Library(path.read_bytes(), device.code, device.source)
