"""An ARM processor of qemu-user that calls kernels: cross-compiled here, one process a library, tensors through a pipe."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.link import linker

_COMPILER = "aarch64-linux-gnu-gcc"
_QEMU = ("qemu-aarch64", "qemu-aarch64-static")
_ROOT = "/usr/aarch64-linux-gnu"
_FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror", "-rdynamic")
_CODES = {"i": 0, "u": 1, "f": 2}

# A processor of qemu for each row: the oldest that has its instructions.
PROCESSORS = {
    "neon": "cortex-a53",
    "neon-dotprod": "cortex-a76",
    "neon-i8mm": "max",
    "android-arm64": "cortex-a53",
    "raspberry-pi-4": "cortex-a72",
    "raspberry-pi-5": "cortex-a76",
    "graviton2": "neoverse-n1",
    "graviton3": "max",
    "apple-m1": "max",
}


def _missing() -> str | None:
    qemu = [name for name in _QEMU if shutil.which(name)]
    absent = [name for name in (_COMPILER,) if not shutil.which(name)] + (
        [] if qemu else [_QEMU[0]]
    )
    if not absent:
        return None
    return f"needs {' and '.join(absent)}: apt-get install qemu-user gcc-aarch64-linux-gnu"


_REASON = _missing()
needs_qemu = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@functools.cache
def _driver() -> Path:
    """The driver, compiled once a process."""
    folder = tempfile.mkdtemp(prefix="graphopt-arm-")
    source, program = Path(__file__).with_name("driver.c"), Path(folder) / "driver"
    folders = (tvm_ffi.libinfo.find_include_path(), Path(tvm.__file__).parent / "include")
    includes = [f"-I{folder}" for folder in folders]
    command = [_COMPILER, *_FLAGS, *includes, str(source), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    return program


def build(functions: Mapping[str, Any], row: Isa) -> bytes:
    """A shared library of kernels."""
    module = tvm.compile(tvm.IRModule(dict(functions)), target=row.target())
    with tempfile.TemporaryDirectory(prefix="graphopt-arm-") as folder:
        path = Path(folder) / "kernels.so"
        module.export_library(str(path), fcompile=linker(row.mtriple))
        return path.read_bytes()


class Machine:
    """A processor with a library: ``with Machine(library, "cortex-a76") as machine: machine.call(name, arrays, out)``."""

    def __init__(self, library: bytes, processor: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-arm-")
        path = Path(self._folder.name) / "model.so"
        path.write_bytes(library)
        qemu = next(name for name in _QEMU if shutil.which(name))
        self.processor = processor
        command = [qemu, "-cpu", processor, "-L", _ROOT, str(_driver()), str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, arrays: list[np.ndarray], out: np.ndarray) -> np.ndarray:
        """What the kernel makes of ``out``, its last argument."""
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        pipe.write(np.uint32(len(name)).tobytes() + name.encode())
        pipe.write(np.uint32(len(arrays) + 1).tobytes())
        for array in (*arrays, out):
            code = _CODES[array.dtype.kind]
            head = np.array([code, 8 * array.itemsize, array.ndim], np.uint32)
            pipe.write(head.tobytes() + np.array(array.shape, np.int64).tobytes())
            pipe.write(np.ascontiguousarray(array).tobytes())
        pipe.flush()
        status = answers.read(4)
        if len(status) < 4:
            raise RuntimeError(
                f"{name} ended the process on {self.processor}: {self._process.wait()}"
            )
        assert status == bytes(4), f"{name} failed on {self.processor}"
        data = answers.read(out.nbytes)
        return np.frombuffer(data, out.dtype).reshape(out.shape)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
        self._folder.cleanup()


def run(function: Any, row: Isa, *arrays: np.ndarray, out: np.ndarray) -> np.ndarray:
    """One call of one kernel."""
    name = str(function.attrs["global_symbol"])
    with Machine(build({name: function}, row), PROCESSORS[row.name]) as machine:
        return machine.call(name, list(arrays), out)
