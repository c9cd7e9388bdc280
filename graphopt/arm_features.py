"""What an ARM CPU can do, in the words of ``/proc/cpuinfo``, asked of the system itself.

Linux and Android tell every process by its auxiliary vector what all of the machine's processors have, in containers without
``/proc`` too; bits are those of Linux' ``asm/hwcap.h`` for arm64. macOS answers ``sysctl`` by the architecture's own names.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from types import MappingProxyType

_AUXILIARY = (16, 26)  # AT_HWCAP, AT_HWCAP2
# Names by bit, from 0.
_FIRST = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32"),
    *("atomics", "fphp", "asimdhp", "cpuid", "asimdrdm", "jscvt", "fcma", "lrcpc"),
    *("dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm"),
    *("dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)
_SECOND = (
    *("dcpodp", "sve2", "sveaes", "svepmull", "svebitperm", "svesha3", "svesm4", "flagm2"),
    *("frint", "svei8mm", "svef32mm", "svef64mm", "svebf16", "i8mm", "bf16", "dgh", "rng"),
)
# feature -> which word of the auxiliary vector, bit
HWCAPS = MappingProxyType(
    {
        name: (word, bit)
        for word, names in enumerate((_FIRST, _SECOND))
        for bit, name in enumerate(names)
    }
)

# sysctl's name below hw.optional -> features
_APPLE = MappingProxyType(
    {
        "floatingpoint": ("fp",),
        "AdvSIMD": ("asimd",),
        "armv8_crc32": ("crc32",),
        "arm.FEAT_AES": ("aes",),
        "arm.FEAT_BF16": ("bf16",),
        "arm.FEAT_DotProd": ("asimddp",),
        "arm.FEAT_DPB": ("dcpop",),
        "arm.FEAT_FCMA": ("fcma",),
        "arm.FEAT_FHM": ("asimdfhm",),
        "arm.FEAT_FlagM": ("flagm",),
        "arm.FEAT_FlagM2": ("flagm2",),
        "arm.FEAT_FP16": ("fphp", "asimdhp"),
        "arm.FEAT_FRINTTS": ("frint",),
        "arm.FEAT_I8MM": ("i8mm",),
        "arm.FEAT_JSCVT": ("jscvt",),
        "arm.FEAT_LRCPC": ("lrcpc",),
        "arm.FEAT_LRCPC2": ("ilrcpc",),
        "arm.FEAT_LSE": ("atomics",),
        "arm.FEAT_LSE2": ("uscat",),
        "arm.FEAT_PMULL": ("pmull",),
        "arm.FEAT_RDM": ("asimdrdm",),
        "arm.FEAT_SB": ("sb",),
        "arm.FEAT_SHA1": ("sha1",),
        "arm.FEAT_SHA256": ("sha2",),
        "arm.FEAT_SHA3": ("sha3",),
        "arm.FEAT_SHA512": ("sha512",),
    }
)


def auxiliary_value(kind: int) -> int:
    """``getauxval(kind)``; 0 where the process was given none, or the C library has no such function."""
    try:
        function = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError):
        return 0
    function.restype, function.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(function(kind))


def _sysctl(name: str) -> int:
    """An integer of ``sysctl``; 0 where it knows no such name."""
    value, size = ctypes.c_int64(), ctypes.c_size_t(8)
    function = ctypes.CDLL(None).sysctlbyname
    failed = function(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return 0 if failed else int(value.value)


def _of_linux(auxiliary: Callable[[int], int]) -> frozenset[str]:
    words = [auxiliary(kind) for kind in _AUXILIARY]
    return frozenset(name for name, (word, bit) in HWCAPS.items() if words[word] >> bit & 1)


def _of_macos(sysctl: Callable[[str], int]) -> frozenset[str]:
    return frozenset(
        feature
        for name, features in _APPLE.items()
        if sysctl(f"hw.optional.{name}")
        for feature in features
    )


def arm_features() -> frozenset[str]:
    """Return the features of this ARM machine's processors; empty where the system does not say."""
    system = platform.system()
    if system == "Darwin":
        return _of_macos(_sysctl)
    return _of_linux(auxiliary_value) if system in ("Linux", "Android") else frozenset()
