"""The TVM runtime, and nothing else of TVM: ``libtvm_ffi`` and ``libtvm_runtime`` (6 MB), no compiler.

Works beside a full ``import tvm`` in the same process, before or after it. The thread pool of TVM
belongs to the calling thread, cannot grow once made, and would pin its owner to half the cores:
``use_threads`` sizes it on first use, and threads stay where the operating system puts them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from graphopt.errors import ArtifactError

_BIG_CORES = 1  # TVM's ThreadGroup::AffinityMode; of no effect while TVM_BIND_THREADS is 0
_LOCK = threading.Lock()
_POOL = threading.local()


class _NoTorch:
    """An import hook that hides torch from one thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is not needed to run a compiled model", name=name)
        return None


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep ``import tvm_ffi`` from importing torch (2 s) merely because it is installed."""
    if "torch" in sys.modules:
        yield
        return
    hook = _NoTorch()
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)


def library_folders() -> list[Path]:
    """Where TVM's libraries are. Raises ArtifactError."""
    spec = importlib.util.find_spec("tvm")  # finds the folder, imports nothing
    if spec is None or spec.origin is None:
        raise ArtifactError("the TVM runtime is not installed: pip install apache-tvm")
    return [Path(spec.origin).parent / "lib"]


@functools.cache
def _load() -> ModuleType:
    # Set before the library reads them: no pinning, and no pool for a thread that asked for none.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    with _without_torch():
        import tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=library_folders())
    return tvm_ffi


def tvm_runtime() -> ModuleType:
    """Return ``tvm_ffi`` with the TVM runtime library loaded."""
    with _LOCK:
        return _load()


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Let kernels called from the current thread run on ``count`` threads, itself included.

    A pool is made with one thread a CPU the first time that a thread asks for more than one; from
    then on the count only says how many of them work. Requests beyond the pool are cut to it.
    """
    current = getattr(_POOL, "count", None)
    if current == count:
        return
    if current is None and count == 1 and os.environ.get("TVM_NUM_THREADS") == "1":
        _POOL.count = 1  # TVM runs kernels inline then, without making a pool
        return
    configure = tvm_runtime().get_global_func("runtime.config_threadpool")
    places = [str(cpu) for cpu in range(max(count, available_cpus()))]
    configure(_BIG_CORES, count, places)
    if count == 1:
        configure(_BIG_CORES, 1, places[:1])  # a concurrency of 1 bypasses the pool
    _POOL.count = count
