"""What benchmarks/arm.py reads from assembly, and what it finds in ours: no register tile of a dense kernel spills."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from benchmarks import arm
from graphopt.backends.arm.isa import ISAS

TEXT = """
main:
	.cfi_startproc
	mov	x9, #0
.LBB0_1:
	ldp	q0, q1, [x0]
	ldr	d2, [sp, #16]
.Ltmp3:
	.loc	1 0 0
.LBB0_2:
	ld1r	{ v3.4s }, [x1], #4
	ldr	s5, [x2], #4
	ldp	q6, q7, [sp, #32]
	str	q6, [sp, #32]
	str	q6, [x4]
	sdot	v4.4s, v0.16b, v3.4b[1] // a comment
	smlal2	v4.4s, v0.8h, v1.8h
	smlal	v4.4s, v0.4h, v1.h[2]
	smlsl2	v4.8h, v0.16b, v1.16b
	add	x9, x9, #1
	cmp	x9, #64
	b.ne	.LBB0_2
	tbnz	w9, #0, .LBB0_1
	ret
"""


def test_the_innermost_loop_and_what_it_moves() -> None:
    lines = arm.instructions(TEXT)
    (body,) = arm.loops(lines)
    assert [line.split()[0] for line in body] == [
        *("ld1r", "ldr", "ldp", "str", "str", "sdot", "smlal2", "smlal", "smlsl2"),
        *("add", "cmp", "b.ne"),
    ]
    assert [arm._loaded(line) for line in body[:5]] == [1, 1, 0, 0, 0]
    assert [arm._spilled(line) for line in body[:5]] == [0, 0, 2, 1, 0]
    assert [arm._macs(line) for line in body[5:9]] == [16, 4, 4, 8]


@pytest.mark.parametrize("row", ["neon", "raspberry-pi-5", "graviton3"])
@pytest.mark.parametrize("label", ["int8 3x3, 56x56x64", "f32 3x3, 56x56x64"])
def test_dense_tiles_stay_in_registers(row: str, label: str) -> None:
    loop = arm.examine(label, ISAS[row])
    assert loop.spills == 0
    if "f32" in label:
        assert loop.products_a_load > 3.5
        return
    instruction, products_a_load, share = {
        "neon": ("smull", 1.8, 0.45),  # halves of a vector
        "raspberry-pi-5": ("sdot", 3.5, 0.65),
        "graviton3": ("usmmla", 1.5, 0.6),
    }[row]
    assert loop.mix[instruction]
    assert loop.products_a_load > products_a_load
    assert loop.products > share * loop.instructions


@pytest.mark.skipif(
    not (shutil.which("llvm-mca-22") or shutil.which("llvm-mca-19")),
    reason="needs a llvm-mca that has a model of the Neoverse V1: apt-get install llvm-19",
)
@pytest.mark.parametrize("label", ["int8 3x3, 56x56x64", "int8 1x1, 28x28x128 to 512, residual"])
def test_matrices_multiply_more_a_cycle_than_dot_products(label: str) -> None:
    row = ISAS["graviton3"]
    matrices = arm.examine(label, row, "neoverse-v1")
    dots = arm.examine(label, dataclasses.replace(row, matrix_intrinsic=""), "neoverse-v1")
    assert "usmmla" not in dots.mix
    assert matrices.macs / matrices.cycles > 1.3 * dots.macs / dots.cycles


def test_half_a_block_counts_half() -> None:
    """One row of a linear layer: a block's second pixel is none."""
    loop = arm.examine("int8 linear, 2048 to 1000", ISAS["graviton3"])
    assert loop.macs == 16 * loop.products


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca: apt-get install llvm")
def test_llvm_mca_counts_two_dot_products_a_cycle() -> None:
    body = [f"\tsdot\tv{i}.4s, v30.16b, v31.4b[0]" for i in range(16)]
    assert 7 <= arm.cycles(body, "neoverse-n1") <= 20


def test_the_table_has_a_row_a_loop() -> None:
    loop = arm.Loop("k", "neon", "cortex-a72", "4 x 2", 512, 32, 8, 0, 50, 16.0)
    head, _, line = arm.table([loop])
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("k", "neon", "cortex-a72", "4 x 2", "32", "4.0", "0", "50", "16.0", "32.0"),
    ]
    assert head.count("|") == line.count("|")
