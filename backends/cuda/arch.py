"""GPU architectures as rows of data: what their tensor cores take, how shared memory is filled, how large it is.

Sources: the PTX ISA (which instruction from which ``sm`` on), the CUDA C programming guide's table of compute capabilities
(shared memory), NVIDIA's data sheets and architecture papers of the chips named (dense int8 rate over clock and multiprocessors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.backends.cuda.products import AMPERE, TURING


@dataclass(frozen=True)
class Arch:
    """A row: ``products`` are bodies ``c += a * b`` on the registers of a fragment, by the names of ``products``.

    ``mma_shape`` is the instruction that multiplies bytes. ``async_copy``: shared memory is filled by ``cp.async``.
    ``shared_bytes`` is what a block may declare statically, ``dynamic_bytes`` what it may ask for at its launch,
    ``multiprocessors`` those of a usual card. ``sparse``: there are products of weights pruned 2:4 (``mma.sp``).

    ``rate``: bytes of k that a multiprocessor multiplies a cycle, over all its outputs: products of int8, half as many of
    float16, a quarter of tf32. Of Hopper's 4096, ``mma`` reaches about 62 % (the rest takes ``wgmma``).
    """

    name: str
    products: Mapping[str, str] = field(compare=False, repr=False)
    mma_shape: str
    async_copy: bool
    multiprocessors: int
    rate: int
    dynamic_bytes: int
    shared_bytes: int = 48 * 1024
    warp: int = 32
    sparse: bool = False


def _ampere(name: str, multiprocessors: int, rate: int, dynamic_kilobytes: int) -> Arch:
    dynamic = dynamic_kilobytes * 1024
    return Arch(name, AMPERE, "m16n8k32", True, multiprocessors, rate, dynamic, sparse=True)


ARCHS = {
    row.name: row
    for row in (
        Arch("sm_75", TURING, "m8n8k16", False, 40, 1024, 64 * 1024),  # T4
        _ampere("sm_80", 108, 2048, 163),  # A100
        _ampere("sm_86", 84, 1024, 99),  # A40, RTX 3090
        _ampere("sm_87", 16, 2048, 163),  # Jetson AGX Orin
        _ampere("sm_89", 142, 1024, 99),  # L40S, RTX 4090
        _ampere("sm_90", 132, 2540, 227),  # H100
    )
}
