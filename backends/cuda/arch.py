"""GPU architectures as rows of data: what their tensor cores take, how shared memory is filled, how large it is.

Sources: the PTX ISA (which instruction from which ``sm`` on) and the CUDA C programming guide's table of compute
capabilities (shared memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.backends.cuda.products import AMPERE, TURING


@dataclass(frozen=True)
class Arch:
    """A row: ``products`` are bodies ``c += a * b`` on the registers of a fragment, by the names of ``products``.

    ``mma_shape`` is the instruction that multiplies bytes. ``async_copy``: shared memory is filled by ``cp.async``.
    ``shared_bytes`` is what a block may declare statically, ``multiprocessors`` those of a usual card. ``sparse``: there are
    products of weights pruned 2:4 (``mma.sp``).
    """

    name: str
    products: Mapping[str, str] = field(compare=False, repr=False)
    mma_shape: str
    async_copy: bool
    multiprocessors: int
    shared_bytes: int = 48 * 1024
    warp: int = 32
    sparse: bool = False


def _ampere(name: str, multiprocessors: int) -> Arch:
    return Arch(name, AMPERE, "m16n8k32", True, multiprocessors, sparse=True)


ARCHS = {
    row.name: row
    for row in (
        Arch("sm_75", TURING, "m8n8k16", False, 40),  # T4
        _ampere("sm_80", 108),  # A100
        _ampere("sm_86", 84),  # A40, RTX 3090
        _ampere("sm_87", 16),  # Jetson AGX Orin
        _ampere("sm_89", 142),  # L40S, RTX 4090
        _ampere("sm_90", 132),  # H100
    )
}
