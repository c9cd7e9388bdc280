"""What happens before a GPU is touched: device code from a library, and the errors of a machine without CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm_ffi

from graphopt import cuda_runtime
from graphopt.backends.cuda.toolkit import INSTALL, find_nvcc, image_as_text
from graphopt.cuda_runtime import Device, device_code, device_code_for, load_runtime
from graphopt.errors import ArtifactError, TargetError

_CALLBACK = "tvm_callback_cuda_compile"
_SOURCE = 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] *= 2; }\n'


def test_a_cubin_is_passed_on_as_it_is() -> None:
    assert device_code(image_as_text(b"\x7fELF code"), "sm_80") == b"\x7fELF code"


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_source_is_compiled_where_it_is_loaded() -> None:
    code = device_code(_SOURCE, "sm_80")
    assert code.startswith(b"\x7fELF")
    assert b"kernel" in code


def test_source_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runtime, "find_nvcc", lambda: None)
    with pytest.raises(ArtifactError) as caught:
        device_code(_SOURCE, "sm_80")
    assert str(caught.value) == (
        f"the model holds CUDA source for sm_80 and nvcc was not found to compile it; {INSTALL}, "
        "or compile the model on a machine that has it"
    )


def test_the_callback_is_there_while_a_library_is_loaded_only() -> None:
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    with device_code_for("sm_80"):
        ours = tvm_ffi.get_global_func(_CALLBACK)
        assert ours(image_as_text(b"\x7fELF code")) == b"\x7fELF code"
    after = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    assert (after is None) == (before is None)
    if after is not None and before is not None:
        assert after.same_as(before)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("tvm_ffi.libinfo.load_lib_ctypes", refuse)
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        pytest.skip("CUDA is here")
    load_runtime.cache_clear()
    with pytest.raises(TargetError) as caught:
        load_runtime()
    assert str(caught.value) == (
        "the model is compiled for a GPU and CUDA cannot be used here (libcuda.so.1: cannot open shared object file); "
        "install NVIDIA's driver (libcuda.so.1) and the package nvidia-cuda-runtime of CUDA 13 (libcudart.so.13)"
    )


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64", "bool"])
def test_tensors_go_to_a_device_and_come_back(dtype: str) -> None:
    array = (np.arange(24).reshape(2, 3, 4) % 2).astype(dtype)
    device = Device("cpu")
    assert (device.array(device.tensor(array)) == array).all()
