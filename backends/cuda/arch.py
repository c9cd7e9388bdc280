"""GPU architectures as rows of data: what their tensor cores take, how shared memory is filled, how large it is.

Sources: the PTX ISA (which instruction from which ``sm`` on) and the CUDA C programming guide's table of compute
capabilities (shared memory).
"""

from __future__ import annotations

from dataclasses import dataclass

# One warp's 16 x 8 x 32 product of bytes. The zero point is in the bias, so that x stays unsigned.
_MMA_K32 = """\
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
"""
# The same product of four 8 x 8 x 16 ones: their registers hold the same elements.
_MMA_K16 = "".join(
    f"""\
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {{%0, %1}}, {{%2}}, {{%3}}, {{%0, %1}};"
               : "+r"(c[{c}]), "+r"(c[{c + 1}]) : "r"(a[{a}]), "r"(b[{b}]));
"""
    for c, a, b in ((0, 0, 0), (2, 1, 0), (0, 2, 1), (2, 3, 1))
)


@dataclass(frozen=True)
class Arch:
    """A row: ``mma`` is the body of a 16 x 8 x 32 product of uint8 and int8 on registers ``c += a * b``.

    ``async_copy``: shared memory is filled by ``cp.async``. ``shared_bytes`` is what a block may declare statically,
    ``multiprocessors`` those of a usual card.
    """

    name: str
    mma: str
    mma_shape: str
    async_copy: bool
    multiprocessors: int
    shared_bytes: int = 48 * 1024
    warp: int = 32


def _ampere(name: str, multiprocessors: int) -> Arch:
    return Arch(name, _MMA_K32, "m16n8k32", True, multiprocessors)


ARCHS = {
    row.name: row
    for row in (
        Arch("sm_75", _MMA_K16, "m8n8k16", False, 40),  # T4
        _ampere("sm_80", 108),  # A100
        _ampere("sm_86", 84),  # A40, RTX 3090
        _ampere("sm_87", 16),  # Jetson AGX Orin
        _ampere("sm_89", 142),  # L40S, RTX 4090
        _ampere("sm_90", 132),  # H100
    )
}
