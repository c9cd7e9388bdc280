"""Features as ``/proc/cpuinfo`` names them, as the test of a C program: CPUID on x86, the auxiliary vector of Linux on ARM.

Bits are those of Intel's manual (volume 2, CPUID), AMD's (0x80000001) and of ``arm_features``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from graphopt.arm_features import HWCAPS
from graphopt.errors import ExportError

_EAX, _EBX, _ECX, _EDX = range(4)

# feature -> leaf, subleaf, word, bit
_X86 = MappingProxyType(
    {
        "ssse3": (1, 0, _ECX, 9),
        "fma": (1, 0, _ECX, 12),
        "cx16": (1, 0, _ECX, 13),
        "sse4_1": (1, 0, _ECX, 19),
        "sse4_2": (1, 0, _ECX, 20),
        "movbe": (1, 0, _ECX, 22),
        "popcnt": (1, 0, _ECX, 23),
        "xsave": (1, 0, _ECX, 27),  # OSXSAVE: what Linux means, and what XGETBV needs
        "avx": (1, 0, _ECX, 28),
        "f16c": (1, 0, _ECX, 29),
        "bmi1": (7, 0, _EBX, 3),
        "avx2": (7, 0, _EBX, 5),
        "bmi2": (7, 0, _EBX, 8),
        "avx512f": (7, 0, _EBX, 16),
        "avx512dq": (7, 0, _EBX, 17),
        "avx512cd": (7, 0, _EBX, 28),
        "avx512bw": (7, 0, _EBX, 30),
        "avx512vl": (7, 0, _EBX, 31),
        "avx512_vbmi": (7, 0, _ECX, 1),
        "gfni": (7, 0, _ECX, 8),
        "avx512_vnni": (7, 0, _ECX, 11),
        "avx_vnni": (7, 1, _EAX, 4),
        "avx512_bf16": (7, 1, _EAX, 5),
        "lahf_lm": (0x80000001, 0, _ECX, 0),
        "abm": (0x80000001, 0, _ECX, 5),
    }
)
_YMM, _ZMM = 0x6, 0xE6  # registers of XCR0


def cpu_values(architecture: str, features: Collection[str]) -> dict[str, str]:
    """What the template ``cpu_<architecture>.c`` leaves open. Raises ExportError for a feature that no test is known of."""
    if architecture == "aarch64":
        masks = [0, 0]
        for word, bit in _known(HWCAPS, features):
            masks[word] |= 1 << bit
        return {"hwcap": hex(masks[0]), "hwcap2": hex(masks[1])}
    rows: dict[tuple[int, int, int], int] = {}
    for leaf, subleaf, word, bit in _known(_X86, features):
        rows[leaf, subleaf, word] = rows.get((leaf, subleaf, word), 0) | 1 << bit
    lines = [
        f"    {{{leaf:#x}, {subleaf}, {word}, {bits:#010x}}},"
        for (leaf, subleaf, word), bits in sorted(rows.items())
    ]
    wide = any(name.startswith("avx512") for name in features)
    saved = _ZMM if wide else _YMM if "avx" in features else 0
    return {"features": "\n".join(lines or ["    {1, 0, 0, 0},"]), "saved": hex(saved)}


def _known(
    table: Mapping[str, tuple[int, ...]], features: Collection[str]
) -> list[tuple[int, ...]]:
    unknown = sorted(set(features) - set(table))
    if unknown:
        raise ExportError(
            f"the target needs {', '.join(unknown)}, which C code has no test for; "
            "add it to graphopt/export/cpu.py"
        )
    return [table[name] for name in sorted(features)]
