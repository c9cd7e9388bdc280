"""The aarch64 rows: three instruction sets, and the chips that are made of them.

A dot product takes the activations of a lane where they lie (``sdot v0.4s, v1.16b, v2.4b[3]``), so that a load of 16 bytes
serves 4 steps of a pixel. ``sdot`` knows no uint8: activations are flipped to int8. A chip's row has the caches and the
``mcpu`` that its code is scheduled for; whatever else LLVM may use of it is among the features of its target.
"""

from __future__ import annotations

from dataclasses import replace

from graphopt.backends.cpu.isa import Isa

_TRIPLE = "aarch64-linux-gnu"
_BASE = ("asimd",)
# Scheduled for a core that reorders: what LLVM does for one that does not, loads early, spills.
_MATTR = ("+neon", "-aes", "-crc", "-sha2")
_KIB = 1024

NEON = Isa(
    name="neon",
    mtriple=_TRIPLE,
    mcpu="cortex-a72",
    mattr=_MATTR,
    features=_BASE,
    lanes=4,
    registers=32,
    dot_intrinsic="llvm.aarch64.neon.smull",
    pair_intrinsic="",
    dot_accumulates=True,
    fma=True,
    pack_words="llvm.aarch64.neon.sqxtn",
    pack_bytes="llvm.aarch64.neon.sqxtun",
    form="long",
    flips=(0x80, 0x80, 0x7F, 0x7F),
    by_element=True,
    packs_two=False,
    round_intrinsic="llvm.aarch64.neon.fcvtns",
    latency=4.0,
    loads_a_cycle=1.0,
    l2_bytes_a_cycle=8.0,
)
DOTPROD = replace(
    NEON,
    name="neon-dotprod",
    mattr=(*_MATTR, "+dotprod"),
    features=(*_BASE, "asimddp"),
    dot_intrinsic="llvm.aarch64.neon.sdot",
    form="dot",
    flips=(0x80, 0x80, 0x80, 0x80),
    loads_a_cycle=2.0,
    l2_bytes_a_cycle=16.0,
)
I8MM = replace(
    DOTPROD,
    name="neon-i8mm",
    mattr=(*_MATTR, "+dotprod", "+i8mm"),
    features=(*_BASE, "asimddp", "i8mm"),
    dot_intrinsic="llvm.aarch64.neon.usdot",
    matrix_intrinsic="llvm.aarch64.neon.usmmla",
    flips=(0, 0, 0, 0),
)

ISAS: dict[str, Isa] = {
    row.name: row
    for row in (
        NEON,
        DOTPROD,
        I8MM,
        # Android keeps a register for itself.
        replace(NEON, name="android-arm64", mtriple="aarch64-linux-android"),
        replace(NEON, name="raspberry-pi-4", l2_bytes=1024 * _KIB),
        replace(
            DOTPROD,
            name="raspberry-pi-5",
            mcpu="cortex-a76",
            mattr=("+neon", "+dotprod"),
            l1_bytes=64 * _KIB,
        ),
        replace(
            DOTPROD,
            name="graviton2",
            mcpu="neoverse-n1",
            mattr=("+neon", "+dotprod"),
            l1_bytes=64 * _KIB,
            l2_bytes=1024 * _KIB,
        ),
        replace(
            I8MM,
            name="graviton3",
            mcpu="neoverse-v1",
            mattr=("+neon", "+dotprod", "+i8mm", "-sve"),
            pipes=4,
            loads_a_cycle=3.0,
            l2_bytes_a_cycle=32.0,
            l1_bytes=64 * _KIB,
            l2_bytes=1024 * _KIB,
        ),
        replace(
            DOTPROD,
            name="apple-m1",
            mcpu="apple-m1",
            mattr=("+neon", "+dotprod"),
            pipes=4,
            loads_a_cycle=3.0,
            l2_bytes_a_cycle=32.0,
            l1_bytes=128 * _KIB,
            l2_bytes=4096 * _KIB,
        ),
    )
}
