"""What a model can be compiled for: one row a target, with the CPU features that its code needs.

Feature names are those of ``/proc/cpuinfo``; the sets are the micro-architecture levels of the x86-64
psABI, plus the dot-product instruction of the row. How to generate code for a row (LLVM's name of
the CPU, registers, intrinsics) is in ``backends.x86.isa``, under ``Target.isa``. Imports no TVM:
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
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Target:
    """A row of the target table; ``features`` is all that its code may use."""

    name: str
    kind: str
    isa: str
    triple: str
    features: frozenset[str]
    description: str

    @property
    def architecture(self) -> str:
        """The first part of the triple: ``x86_64``."""
        return self.triple.partition("-")[0]

    def missing(self, features: Collection[str] | None = None) -> tuple[str, ...]:
        """Return the features that this target needs and ``features`` (this CPU's) lack, sorted."""
        available = cpu_features() if features is None else features
        return tuple(sorted(self.features.difference(available)))

    def runs_here(self) -> bool:
        """Tell whether this CPU can run code compiled for this target."""
        return self.architecture == architecture() and not self.missing()


def _x86(name: str, isa: str, features: frozenset[str], description: str) -> Target:
    return Target(name, "cpu", isa, _LINUX_X86, features, description)


# Best first: "native" takes the first row that this CPU can run.
_ROWS = (
    _x86("avx512-vnni", "avx512-vnni", _V4 | {"avx512_vnni"}, "512-bit, int8 by vpdpbusd"),
    _x86("avx-vnni", "avx-vnni", _V3 | {"avx_vnni"}, "256-bit, int8 by vpdpbusd"),
    _x86("avx512", "avx512", _V4, "512-bit, int8 widened to int16"),
    _x86("avx2", "avx2", _V3, "256-bit, int8 widened to int16"),
    _x86("x86-64", "sse4", _V2, "128-bit baseline (x86-64-v2)"),
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
    }
)


def _native() -> Target:
    for row in _ROWS:
        if row.runs_here():
            _LOG.info("target native is %s", row.name)
            return row
    raise TargetError(
        f"target 'native': this {architecture()} CPU runs none of {', '.join(TARGETS)}; "
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
