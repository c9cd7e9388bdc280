"""The x86-64 rows, fastest first. ``mcpu`` is the oldest CPU of the row, ``features`` what the session checks by CPUID."""

from __future__ import annotations

from graphopt.backends.cpu.isa import Isa

_TRIPLE = "x86_64-linux-gnu"
_AVX2 = ("avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_SSE4 = ("cx16", "popcnt", "ssse3", "sse4_1", "sse4_2")

ISAS: dict[str, Isa] = {
    row.name: row
    for row in (
        Isa(
            name="avx512-vnni",
            mtriple=_TRIPLE,
            mcpu="cascadelake",
            mattr=(),
            features=(*_SSE4, *_AVX512, "avx512_vnni"),
            lanes=16,
            registers=32,
            dot_intrinsic="llvm.x86.avx512.vpdpbusd.512",
            pair_intrinsic="llvm.x86.avx512.vpdpwssd.512",
            dot_accumulates=True,
            fma=True,
            pack_words="llvm.x86.avx512.packssdw.512",
            pack_bytes="llvm.x86.avx512.packuswb.512",
            lookup="llvm.x86.avx512.permvar.sf.512",
            l2_bytes=1024 * 1024,
        ),
        Isa(
            name="avx-vnni",
            mtriple=_TRIPLE,
            mcpu="x86-64-v3",
            mattr=("+avxvnni",),
            features=(*_SSE4, *_AVX2, "avx_vnni"),
            lanes=8,
            registers=16,
            dot_intrinsic="llvm.x86.avx512.vpdpbusd.256",
            pair_intrinsic="llvm.x86.avx512.vpdpwssd.256",
            dot_accumulates=True,
            fma=True,
            pack_words="llvm.x86.avx2.packssdw",
            pack_bytes="llvm.x86.avx2.packuswb",
        ),
        Isa(
            name="avx512",
            mtriple=_TRIPLE,
            mcpu="skylake-avx512",
            mattr=(),
            features=(*_SSE4, *_AVX512),
            lanes=16,
            registers=32,
            dot_intrinsic="llvm.x86.avx512.pmaddw.d.512",
            pair_intrinsic="llvm.x86.avx512.pmaddw.d.512",
            form="pairs",
            dot_accumulates=False,
            fma=True,
            pack_words="llvm.x86.avx512.packssdw.512",
            pack_bytes="llvm.x86.avx512.packuswb.512",
            lookup="llvm.x86.avx512.permvar.sf.512",
            l2_bytes=1024 * 1024,
        ),
        Isa(
            name="avx2",
            mtriple=_TRIPLE,
            mcpu="x86-64-v3",
            mattr=(),
            features=(*_SSE4, *_AVX2),
            lanes=8,
            registers=16,
            dot_intrinsic="llvm.x86.avx2.pmadd.wd",
            pair_intrinsic="llvm.x86.avx2.pmadd.wd",
            form="pairs",
            dot_accumulates=False,
            fma=True,
            pack_words="llvm.x86.avx2.packssdw",
            pack_bytes="llvm.x86.avx2.packuswb",
        ),
        Isa(
            name="sse4",
            mtriple=_TRIPLE,
            mcpu="x86-64-v2",
            mattr=(),
            features=_SSE4,
            lanes=4,
            registers=16,
            dot_intrinsic="llvm.x86.sse2.pmadd.wd",
            pair_intrinsic="llvm.x86.sse2.pmadd.wd",
            form="pairs",
            dot_accumulates=False,
            fma=False,
            pack_words="llvm.x86.sse2.packssdw.128",
            pack_bytes="llvm.x86.sse2.packuswb.128",
            l2_bytes=256 * 1024,
        ),
    )
}
