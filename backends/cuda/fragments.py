"""Operands and sums of a warp's tensor-core products in registers: how they come from shared memory, which element is whose.

An operand is rows of k: 16 rows x 32 bytes are one fragment of the first operand of ``mma.m16n8``, or two neighbouring ones
of the second, whose columns are then those rows. Either takes one ``ldmatrix.x4``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.pipeline import HALVES
from graphopt.backends.cuda.products import FRAGMENT_BYTES
from graphopt.backends.cuda.shared_tile import CHUNK, SharedTile

MMA_ROWS, MMA_COLUMNS = 16, 8
ROWS = 16  # of a tile that one load takes
_REGISTERS = 4  # of one load


class Operand:
    """The fragments of ``rows`` rows of a tile from ``first_row`` on; ``left``: they are the product's rows, not columns.

    ``rounds``: float32 elements become tf32 on the way.
    """

    def __init__(
        self,
        device: Device,
        tile: SharedTile,
        lane: Expr,
        first_row: Expr,
        rows: int,
        left: bool,
        rounds: bool = False,
    ) -> None:
        self.device, self.tile, self.rounds = device, tile, rounds
        self.loads = rows // ROWS
        matrix, line = bind(tirx.floordiv(lane, 8)), bind(tirx.floormod(lane, 8))
        half, pair = tirx.floormod(matrix, 2), tirx.floordiv(matrix, 2)
        # left: rows 0-7 and 8-15 of the first 16 bytes, then of the others; right: both halves of k for 8 rows, then the next
        row, chunk = (half, pair) if left else (pair, half)
        at_row, at_column = bind(first_row + row * 8 + line), bind(chunk * CHUNK)
        # where a lane's first row lies in a stage, for each part of k; rows 16 further have their chunks swapped alike
        self.offsets = [
            bind(tile.offset(at_row, at_column + k)) for k in range(0, tile.width, FRAGMENT_BYTES)
        ]
        self.step = _REGISTERS if left else _REGISTERS // 2
        self.half = self.loads * _REGISTERS
        self.registers = T.alloc_buffer((HALVES * self.half,), "uint32", scope="local")

    def load(self, stage: Expr, part: int, half: int) -> None:
        """Bytes ``32 * part ..`` of every row, of the stage that begins at ``stage``, into half ``half`` of the registers."""
        first = bind(stage + self.offsets[part])
        for i in range(self.loads):
            place = T.address_of(self.tile.memory[first + i * ROWS * self.tile.width])
            registers = T.address_of(self.registers[half * self.half + _REGISTERS * i])
            self.device.load_matrices(registers, place)
            if self.rounds:
                self.device.round_tf32(registers)

    def fragment(self, index: int, half: int) -> Expr:
        """The address of the registers of 16 rows of a left operand, of 8 of a right one."""
        return T.address_of(self.registers[half * self.half + self.step * index])


@dataclass(frozen=True)
class Sum:
    """A register of the sums: row and column of its element within the block's tile of products, and its number."""

    row: Expr
    column: Expr
    register: int


def sums_of(
    lane: Expr, first_row: Expr, first_column: Expr, row_tiles: int, column_tiles: int
) -> list[Sum]:
    """Every other register of ``row_tiles x column_tiles`` products, column by column: the next one is of the next column.

    The sums of a column, and those of a row, have the same expression for it.
    """
    row = bind(first_row + tirx.floordiv(lane, 4))
    column = bind(first_column + tirx.floormod(lane, 4) * 2)
    rows = [bind(row + i * 8) for i in range(2 * row_tiles)]
    found = []
    for j in range(column_tiles):
        at_column = bind(column + j * MMA_COLUMNS)
        for i, at_row in enumerate(rows):
            found.append(Sum(at_row, at_column, (i // 2 * column_tiles + j) * 4 + i % 2 * 2))
    return found
