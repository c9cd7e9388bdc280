"""What benchmarks/arm.py reads from assembly, and what it finds in ours: no register tile of a dense kernel spills."""

from __future__ import annotations

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
    loop = arm.examine(label, ISAS[row], processors=())
    assert loop.spills == 0
    assert loop.products_a_load > (1.8 if row == "neon" else 3.5)  # of "long", halves of a vector
    if row != "neon" and "int8" in label:
        assert {"sdot", "sudot"} & set(loop.mix)
        assert loop.products > 0.65 * loop.instructions


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca: apt-get install llvm")
def test_llvm_mca_counts_two_dot_products_a_cycle() -> None:
    body = [f"\tsdot\tv{i}.4s, v30.16b, v31.4b[0]" for i in range(16)]
    assert 7 <= arm.cycles(body, "neoverse-n1") <= 20


def test_the_table_has_a_row_a_loop() -> None:
    loop = arm.Loop("k", "neon", "4 x 2", 512, 32, 8, 0, 50, {}, {"cortex-a76": 16.0})
    head, _, line = arm.table([loop], ("cortex-a76",))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("k", "neon", "4 x 2", "32", "4.0", "0", "50", "16.0", "32.0"),
    ]
    assert head.count("|") == line.count("|")
