"""What a model can be compiled for: one row a target, with the CPU features that its code needs, or a GPU.

Feature names are those of ``/proc/cpuinfo``; the sets are the micro-architecture levels of the x86-64
psABI, plus the dot-product instruction of the row; of ARM chips, what the kernel says of them. How to generate code for a row (LLVM's name of
the CPU, registers, intrinsics) is in ``backends.isas``, under ``Target.isa``; of a GPU in ``backends.cuda.arch``. Imports no TVM:
sessions check features with it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

from graphopt.cpu_features import architecture, cpu_features
from graphopt.errors import TargetError

_LOG = logging.getLogger(__name__)

_LINUX_X86 = "x86_64-unknown-linux-gnu"
_LINUX_ARM = "aarch64-unknown-linux-gnu"
_ANDROID = "aarch64-unknown-linux-android"
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_NEON = frozenset({"asimd"})
_ARM_V8_2 = _NEON | {
    *("aes", "asimddp", "asimdhp", "asimdrdm", "atomics", "crc32", "fphp", "lrcpc"),
    *("pmull", "sha1", "sha2"),
}
_ARM_V8_4 = _ARM_V8_2 | {
    *("asimdfhm", "dcpop", "fcma", "flagm", "ilrcpc", "jscvt", "sha3", "sha512", "uscat"),
}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


# Families of kernels of ours.
_DENSE = ("convolution", "depthwise", "linear", "pooling", "element-wise")
KERNELS = (*_DENSE, "Winograd", "sparse", "attention", "softmax", "layer norm")
_NOT_SPARSE = tuple(family for family in KERNELS if family != "sparse")


@dataclass(frozen=True)
class Target:
    """A row of the target table; ``features`` is all that its code may use."""

    name: str
    kind: str
    isa: str
    triple: str
    features: frozenset[str]
    description: str
    verified: str = "compiled only"  # how the tests run its code
    kernels: tuple[str, ...] = ()  # families; other operators are TVM's

    @property
    def architecture(self) -> str:
        """The first part of the triple: ``x86_64``."""
        return self.triple.partition("-")[0]

    def missing(self, features: Collection[str] | None = None) -> tuple[str, ...]:
        """Return the features that this target needs and ``features`` (this CPU's) lack, sorted."""
        available = cpu_features() if features is None else features
        return tuple(sorted(self.features.difference(available)))

    def runs_here(self) -> bool:
        """Tell whether this CPU can run code compiled for this target; a GPU is asked when a model is loaded."""
        same = self.kind == "cpu" and self.architecture == architecture()
        return same and not self.missing()


def _x86(name: str, isa: str, features: frozenset[str], description: str) -> Target:
    verified = f"run on x86-64 processors that have {isa}"
    kernels = _NOT_SPARSE if isa == "sse4" else KERNELS
    return Target(name, "cpu", isa, _LINUX_X86, features, description, verified, kernels)


def _arm(
    name: str, features: frozenset[str], processor: str, description: str, isa: str = ""
) -> Target:
    triple = _ANDROID if name.startswith("android") else _LINUX_ARM
    verified = f"emulated: qemu-user, {processor}"
    return Target(name, "cpu", isa or name, triple, features, description, verified, KERNELS)


def _gpu(name: str, description: str, arch: str = "", triple: str = _LINUX_X86) -> Target:
    verified = "compiled only; kernels interpreted"
    return Target(name, "cuda", arch or name, triple, frozenset(), description, verified, _DENSE)


# Best first: "native" takes the first row that this CPU can run.
_ROWS = (
    _x86("avx512-vnni", "avx512-vnni", _V4 | {"avx512_vnni"}, "512-bit, int8 by vpdpbusd"),
    _x86("avx-vnni", "avx-vnni", _V3 | {"avx_vnni"}, "256-bit, int8 by vpdpbusd"),
    _x86("avx512", "avx512", _V4, "512-bit, int8 widened to int16"),
    _x86("avx2", "avx2", _V3, "256-bit, int8 widened to int16"),
    _x86("x86-64", "sse4", _V2, "128-bit baseline (x86-64-v2)"),
    _arm("aarch64-i8mm", _NEON | {"asimddp", "i8mm"}, "max", "NEON, int8 by usmmla", "neon-i8mm"),
    _arm(
        "aarch64-dotprod", _NEON | {"asimddp"}, "cortex-a76", "NEON, int8 by sdot", "neon-dotprod"
    ),
    _arm("aarch64", _NEON, "cortex-a53", "NEON, int8 by widening multiplies", "neon"),
    _arm("raspberry-pi-4", _NEON | {"crc32"}, "cortex-a72", "Cortex-A72, NEON"),
    _arm("raspberry-pi-5", _ARM_V8_2, "cortex-a76", "Cortex-A76, int8 by sdot"),
    _arm("graviton2", _ARM_V8_2, "neoverse-n1", "Neoverse N1, int8 by sdot"),
    _arm(
        "graviton3",
        _ARM_V8_4 | {"bf16", "i8mm", "rng"},
        "max",
        "Neoverse V1, int8 by usmmla",
    ),
    _arm("apple-m1", _ARM_V8_4 | {"flagm2", "frint", "sb"}, "max", "aarch64 Linux, int8 by sdot"),
    _arm("android-arm64", _NEON, "cortex-a53", "any arm64 Android, NEON"),
    _gpu("sm_75", "GPU, int8 by mma m8n8k16"),
    _gpu("sm_80", "GPU, int8 by mma m16n8k32"),
    _gpu("sm_86", "GPU, int8 by mma m16n8k32"),
    _gpu("sm_89", "GPU, int8 by mma m16n8k32"),
    _gpu("sm_90", "GPU, int8 by mma m16n8k32"),
    _gpu("jetson-orin", "GPU (sm_87) of an aarch64 board", "sm_87", _LINUX_ARM),
)

TARGETS = MappingProxyType({row.name: row for row in _ROWS})

ALIASES = MappingProxyType(
    {
        "x86-64-v2": "x86-64",
        "nehalem": "x86-64",
        "sandy-bridge": "x86-64",
        "x86-64-v3": "avx2",
        "haswell": "avx2",
        "broadwell": "avx2",
        "skylake": "avx2",
        "zen": "avx2",
        "zen2": "avx2",
        "zen3": "avx2",
        "alder-lake": "avx-vnni",
        "raptor-lake": "avx-vnni",
        "meteor-lake": "avx-vnni",
        "lunar-lake": "avx-vnni",
        "arrow-lake": "avx-vnni",
        "sierra-forest": "avx-vnni",
        "x86-64-v4": "avx512",
        "skylake-x": "avx512",
        "cascade-lake": "avx512-vnni",
        "ice-lake": "avx512-vnni",
        "tiger-lake": "avx512-vnni",
        "sapphire-rapids": "avx512-vnni",
        "granite-rapids": "avx512-vnni",
        "zen4": "avx512-vnni",
        "zen5": "avx512-vnni",
        "arm64": "aarch64",
        "armv8-a": "aarch64",
        "cortex-a53": "aarch64",
        "cortex-a55": "aarch64-dotprod",
        "cortex-a72": "raspberry-pi-4",
        "cortex-a76": "raspberry-pi-5",
        "neoverse-n1": "graviton2",
        "ampere-altra": "graviton2",
        "neoverse-v1": "graviton3",
        "neoverse-v2": "graviton3",
        "graviton4": "graviton3",
        "neoverse-n2": "aarch64-i8mm",
        "cortex-a710": "aarch64-i8mm",
        "sm-75": "sm_75",
        "sm-80": "sm_80",
        "sm-86": "sm_86",
        "sm-87": "jetson-orin",
        "sm-89": "sm_89",
        "sm-90": "sm_90",
        "t4": "sm_75",
        "a100": "sm_80",
        "rtx-3090": "sm_86",
        "rtx-4090": "sm_89",
        "l40s": "sm_89",
        "h100": "sm_90",
    }
)


def _native() -> Target:
    for row in _ROWS:
        if row.runs_here():
            _LOG.info("target native is %s", row.name)
            return row
    raise TargetError(
        f"target 'native': this {architecture()} CPU runs none of "
        f"{', '.join(row.name for row in _ROWS if row.kind == 'cpu')}; "
        "compile on it for a named target of another machine instead"
    )


def resolve(name: str) -> Target:
    """Return the row called ``name``: a target, a well-known chip, or ``native`` (this CPU's best).

    Raises ``TargetError`` for an unknown name, with the nearest known one.
    """
    if name == "native":
        return _native()
    key = name.lower().replace("_", "-")
    row = TARGETS.get(ALIASES.get(key, key))
    if row is not None:
        return row
    near = difflib.get_close_matches(key, ["native", *TARGETS, *ALIASES], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise TargetError(f"unknown target {name!r}: {hint}known are native, {', '.join(TARGETS)}")
