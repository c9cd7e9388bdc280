"""What is read from machine code: the loop that multiplies, registers, spills; and what the kernels' code must be like."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.cuda.toolkit import find_nvcc

_LISTING = """\
	.section	.text.cuda_conv_a_kernel,"ax",@progbits
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMMA.16832.U8.S8 R4, R12.ROW, R20.COL, R4 ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R12, [R30] ;
        /*0030*/                   IMMA.16832.U8.S8 R4, R12.ROW, R20.COL, R4 ;
        /*0040*/               @P0 LDGSTS.E [R31], [R2.64] ;
        /*0050*/                   IMMA.16832.U8.S8 R8, R12.ROW, R22.COL, R8 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
	.section	.text.cuda_conv_b_kernel,"ax",@progbits
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   EXIT ;
"""


@pytest.fixture(name="static")
def _static(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")  # as when it is run
    import cuda_static  # type: ignore[import-not-found]

    return cuda_static  # type: ignore[no-any-return]


def test_the_innermost_loop_that_multiplies(static: ModuleType) -> None:
    code = static.functions(_LISTING)
    assert sorted(code) == ["cuda_conv_a", "cuda_conv_b"]
    assert static.examine(code["cuda_conv_a"]) == static.Loop(32, 1, 5, 2)
    assert static.examine(code["cuda_conv_b"]) == static.Loop(13, 0, 2, 1)


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_the_largest_tile_keeps_to_registers_and_multiplies(static: ModuleType, arch: str) -> None:
    """Nothing spills, and fewer than two other instructions come with a product: tensor cores need four to eight cycles."""
    if find_nvcc() is None or static.disassembler() is None:
        pytest.skip("needs nvcc and nvdisasm")
    for row in static.measure(ARCHS[arch], ["u8", "f16"], ["256x128"]):
        loop = row.loop
        assert loop.spills == 0
        assert loop.registers <= 255
        assert loop.products == 64  # 64 x 64 outputs, 64 bytes of k: the loop is one step
        assert loop.instructions < 3 * loop.products
        assert row.bound == "tensor"


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_the_largest_sparse_tile(static: ModuleType, arch: str) -> None:
    """Nothing spills; half as many products as dense weights need, and fewer than five other instructions with each."""
    if find_nvcc() is None or static.disassembler() is None:
        pytest.skip("needs nvcc and nvdisasm")
    rows = static.measure(ARCHS[arch], ["u8-2of4", "f16-2of4"], ["128x256"])
    assert [row.product for row in rows] == ["u8-2of4", "f16-2of4"]
    for row in rows:
        loop = row.loop
        assert loop.spills == 0
        assert loop.registers <= 255
        assert loop.products == 32  # 64 x 64 outputs, 64 bytes of k: the loop is one step
        assert loop.instructions < 6 * loop.products
        assert row.cycles["issue"] < row.cycles["tensor"]
    assert not static.measure(ARCHS["sm_75"], ["u8-2of4", "tf32-2of4"], [])
