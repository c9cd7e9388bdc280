"""The interpreter's fragments against a second source: the layouts of NVIDIA's CuTe.

``include/cute/atom/mma_traits_sm75.hpp`` and ``mma_traits_sm80.hpp`` of NVIDIA/cutlass (commit 7107b055) say for each
instruction where a value of a lane lies: shapes and strides of (lane, value), of which the dot product is an offset into the
matrix, columns first (A is M x K, B is N x K, C is M x N). The first coordinate runs fastest.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from graphopt.backends.cuda.products import AMPERE, TURING
from tests.backends.cuda.simt_functions import WARP, fragment_of_a, fragment_of_b, fragment_of_c

Shape = tuple[int, ...]

# item bytes: (lane strides, value shape, value strides) of A, the same of B; lanes are (4, 8)
INSTRUCTIONS = {
    "16x8x32 of bytes": (1, ((64, 1), (4, 2, 2), (16, 8, 256)), ((32, 1), (4, 2), (8, 128))),
    "16x8x16 of float16": (2, ((32, 1), (2, 2, 2), (16, 8, 128)), ((16, 1), (2, 2), (8, 64))),
    "16x8x8 of tf32": (4, ((16, 1), (2, 2), (8, 64)), ((8, 1), (2,), (32,))),
}
SUMS = ((32, 1), (2, 2), (16, 8))
# Turing's: 8 x 8 x 16 of bytes, both operands alike, and 16 x 8 x 8 of float16
BYTES_OF_TURING = ((32, 1), (4,), (8,))
HALVES_OF_TURING = (((32, 1), (2, 2), (16, 8)), ((16, 1), (2,), (8,)))


def _coordinates(number: int, shape: Shape) -> list[int]:
    found = []
    for extent in shape:
        found.append(number % extent)
        number //= extent
    return found


def _place(layout: tuple[Shape, Shape, Shape], lane: int, value: int, rows: int) -> tuple[int, int]:
    """Row and column of a value."""
    lane_strides, shape, strides = layout
    offset = np.dot(_coordinates(lane, (4, 8)), lane_strides)
    offset += np.dot(_coordinates(value, shape), strides)
    return int(offset) % rows, int(offset) // rows


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_operands(name: str) -> None:
    size, a, b = INSTRUCTIONS[name]
    many = 4 // size
    for lane in range(WARP):
        at = np.array([lane])
        for value in range(4 * many):
            row, k = fragment_of_a(size, at, *divmod(value, many))
            assert (row[0], k[0]) == _place(a, lane, value, 16)
        for value in range(2 * many):
            k, column = fragment_of_b(size, at, *divmod(value, many))
            assert (column[0], k[0]) == _place(b, lane, value, 8)


def test_sums() -> None:
    for lane in range(WARP):
        for value in range(4):
            row, column = fragment_of_c(np.array([lane]), value)
            assert (row[0], column[0]) == _place(SUMS, lane, value, 16)


def test_turing_multiplies_quarters_of_bytes_and_halves_of_float16() -> None:
    """Register r of the whole fragment is row half r % 2 and half r / 2 of k: what the row's code gives each instruction."""
    for lane in range(WARP):
        at = np.array([lane])
        for register in range(4):
            for element in range(4):
                row, k = fragment_of_a(1, at, register, element)
                part = _place(BYTES_OF_TURING, lane, element, 8)
                assert (row[0] % 8, k[0] % 16) == part
                assert (row[0] // 8, k[0] // 16) == (register % 2, register // 2)
            for element in range(2):
                row, k = fragment_of_a(2, at, register, element)
                value = 2 * (register % 2) + element
                assert (row[0], k[0] % 8) == _place(HALVES_OF_TURING[0], lane, value, 16)
                assert k[0] // 8 == register // 2
        for register in range(2):
            for element in range(2):
                k, column = fragment_of_b(2, at, register, element)
                assert (column[0], k[0] % 8) == _place(HALVES_OF_TURING[1], lane, element, 8)
                assert k[0] // 8 == register


def _registers(code: str) -> list[str]:
    """The registers that each instruction of a body takes: of c, a and b, in the order of its operands."""
    found = []
    for instruction in code.split(";\n")[:-1]:
        assert "%0" in instruction
        found.append("".join(re.findall(r'"\+?[rf]"\(([abc]\[\d\])\)', instruction)))
    return found


def test_the_registers_of_every_instruction() -> None:
    whole = "c[0]c[1]c[2]c[3]a[0]a[1]a[2]a[3]b[0]b[1]"
    assert {name: _registers(code) for name, code in AMPERE.items()} == {
        name: [whole] for name in ("u8", "s8", "f16", "tf32")
    }
    sums = "c[0]c[1]c[2]c[3]"
    assert _registers(TURING["f16"]) == [f"{sums}a[0]a[1]b[0]", f"{sums}a[2]a[3]b[1]"]
    assert _registers(TURING["s8"]) == _registers(TURING["u8"])
