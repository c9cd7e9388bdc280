"""``nvcc``: where it is, and how device code is made of CUDA source. Imports no TVM: a machine that loads a model may need it.

No ``--use_fast_math``, which TVM's own driver passes: it flushes denormal numbers and divides approximately.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from graphopt.errors import CompileError

INSTALL = "install the CUDA toolkit, or its packages (pip install 'graphopt[cuda]'), or set CUDA_HOME to where it is"
_OPTIONS = ("-O3", "-std=c++17", "--disable-warnings")
_IMAGE = "// cubin in base64\n"  # how an image begins where TVM expects source, which is text


def _candidates() -> Iterable[Path]:
    home = os.environ.get("CUDA_HOME")
    if home:
        yield Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"))
    yield Path("/usr/local/cuda/bin/nvcc")


def find_nvcc() -> Path | None:
    """The compiler: of ``CUDA_HOME``, the path, a package of this environment or ``/usr/local/cuda``."""
    return next((path for path in _candidates() if os.access(path, os.X_OK)), None)


def compile_source(source: str, arch: str, form: str = "cubin") -> bytes:
    """Device code of CUDA source for ``arch`` (``sm_80``): a "cubin", or "ptx". Raises CompileError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError(f"target {arch}: nvcc was not found; {INSTALL}")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        text, result = Path(folder) / "kernels.cu", Path(folder) / f"kernels.{form}"
        text.write_text(source)
        command = [str(nvcc), f"--{form}", f"-arch={arch}", *_OPTIONS, "-o", str(result), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if re.search("error|fatal", line)]
            reason = reasons[0].strip() if reasons else f"it ended with {done.returncode}"
            raise CompileError(f"target {arch}: {nvcc} cannot compile the kernels: {reason}")
        return result.read_bytes()


def image_as_text(cubin: bytes) -> str:
    """A cubin in the place of CUDA source: TVM passes that on as UTF-8."""
    return _IMAGE + base64.b64encode(cubin).decode()


def image_in_text(code: str) -> bytes | None:
    """The cubin that ``image_as_text`` wrote, or None for CUDA source."""
    return base64.b64decode(code[len(_IMAGE) :]) if code.startswith(_IMAGE) else None
