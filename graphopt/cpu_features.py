"""The instruction-set features of this machine's CPU, named as the Linux kernel names its CPUID bits.

An ARM system is asked itself (``arm_features``). Linux lists them in ``/proc/cpuinfo`` (``flags`` on x86,
``Features`` on ARM), already without those that the operating system has switched off. Elsewhere NumPy's own
CPUID probe is translated; it knows no AVX-VNNI, so such a machine is only ever under-estimated.
"""

from __future__ import annotations

import functools
import importlib
import platform
from pathlib import Path

from graphopt.arm_features import arm_features

_CPUINFO = Path("/proc/cpuinfo")
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_NUMPY_NAMES = {
    "SSSE3": ("ssse3",),
    "SSE41": ("sse4_1",),
    "SSE42": ("sse4_2",),
    "POPCNT": ("popcnt",),
    "CX16": ("cx16",),
    "LAHF": ("lahf_lm",),
    "AVX": ("avx", "xsave"),
    "F16C": ("f16c",),
    "FMA3": ("fma",),
    "AVX2": ("avx2",),
    "BMI": ("bmi1",),
    "BMI2": ("bmi2",),
    "LZCNT": ("abm",),
    "MOVBE": ("movbe",),
    "GFNI": ("gfni",),
    "AVX512F": ("avx512f",),
    "AVX512BW": ("avx512bw",),
    "AVX512CD": ("avx512cd",),
    "AVX512DQ": ("avx512dq",),
    "AVX512VL": ("avx512vl",),
    "AVX512VNNI": ("avx512_vnni",),
    "ASIMD": ("asimd",),
    "ASIMDDP": ("asimddp",),
}


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Return the features that *every* processor of a ``/proc/cpuinfo`` text lists.

    The intersection, since a thread may run on any of them (hybrid chips).
    """
    processors = [
        frozenset(value.split())
        for key, separator, value in (line.partition(":") for line in text.splitlines())
        if separator and key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*processors) if processors else frozenset()


def _numpy_features() -> frozenset[str]:
    umath = importlib.import_module("numpy._core._multiarray_umath")  # only where there is no /proc

    return frozenset(
        name
        for numpy_name, names in _NUMPY_NAMES.items()
        if umath.__cpu_features__.get(numpy_name, False)
        for name in names
    )


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return this CPU's features (``avx2``, ``avx512_vnni``, ``asimddp`` ...)."""
    if architecture() == "aarch64" and (found := arm_features()):
        return found
    if not _CPUINFO.exists():
        return _numpy_features()
    return parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))


def cpu_name() -> str:
    """Return what the first processor calls itself, with family, model and stepping: ``AMD EPYC 26.2.1``.

    ARM cores have numbers: ``aarch64 0x41.0xd0b.1``, implementer, part and revision.
    """
    if not _CPUINFO.exists():
        return platform.processor() or platform.machine()
    first, _, _ = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    numbers = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
    revision = [found[key] for key in numbers if key in found]
    return f"{found.get('model name', platform.machine())} {'.'.join(revision)}".strip()


def architecture() -> str:
    """Return the architecture as LLVM triples spell it: ``x86_64``, ``aarch64`` ..."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)
