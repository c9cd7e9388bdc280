"""Which compiler links a library for a target: this machine's own, a cross compiler, or Zig's."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from graphopt.cpu_features import architecture
from graphopt.errors import CompileError

Link = Callable[..., None]  # (output, objects, options=...)

# A library for Android takes what it needs from the process that loads it: its C library has another name.
_OPTIONS = {"android": ("-nostdlib",)}
_GLIBC = "2.28"  # that Zig links against, and TVM's own wheels


def cross_compiler(triple: str) -> list[str]:
    """The command of a C compiler for a triple: ``aarch64-linux-gnu-gcc``, or ``zig cc`` from PyPI.

    Raises ``CompileError`` that names both where neither is installed.
    """
    machine = triple.partition("-")[0]
    for name in ("gcc", "g++"):
        found = shutil.which(f"{machine}-linux-gnu-{name}")
        if found:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [
            *(sys.executable, "-m", "ziglang", "cc"),
            *("-target", f"{machine}-linux-gnu.{_GLIBC}"),
        ]
    package = f"gcc-{machine.replace('_', '-')}-linux-gnu"
    raise CompileError(
        f"no compiler on this {architecture()} machine links for {machine}: install "
        f"{machine}-linux-gnu-gcc (apt-get install {package}) or Zig (pip install ziglang)"
    )


def linker(triple: str) -> Link | None:
    """What TVM links a library for ``triple`` with; None for this machine's own compiler.

    Raises ``CompileError`` where there is none, and when it links, where that fails.
    """
    machine, _, system = triple.partition("-")
    extra = [option for name, options in _OPTIONS.items() if name in system for option in options]
    if machine == architecture() and not extra:
        return None
    command = cross_compiler(triple)

    def link(output: str, objects: Sequence[str], options: Sequence[str] = ()) -> None:
        line = [*command, "-shared", "-fPIC", "-o", output, *objects, *extra, *options]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().partition("\n")[0]  # the linker's line, before its driver's
            raise CompileError(
                f"the compiled network could not be linked for {triple}: {' '.join(command)} failed: {said}; repair or reinstall it"
            )

    return link
