"""Every row of instructions that the generator in ``cpu`` makes kernels for, by name."""

from __future__ import annotations

from types import MappingProxyType

from graphopt.backends.arm.isa import ISAS as ARM
from graphopt.backends.x86.isa import ISAS as X86

ISAS = MappingProxyType({**X86, **ARM})
