"""Tiles of rows in shared memory, in stages: chunks of 16 bytes, swapped so that what is read together lies in different banks.

A line of the banks is 128 bytes. Of rows of ``width`` bytes, ``128 / width`` fill one; row r holds its chunk c at
``c ^ (r / (128 / width) % (width / 16))``: the eight rows that ``ldmatrix`` reads together then touch each bank once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.products import item_bytes

CHUNK = 16  # bytes that ldmatrix takes of a row
_LINE = 128  # bytes of all banks
_STATIC = 48 * 1024  # bytes that a kernel may declare


def block_memory(size: int) -> Buffer:
    """A block's bytes of shared memory; TVM's runtime raises the kernel's limit for what is asked for at the launch."""
    return T.alloc_buffer((size,), "uint8", scope="shared" if size <= _STATIC else "shared.dyn")


@dataclass(frozen=True)
class SharedTile:
    """``stages`` tiles of ``rows`` rows of ``width`` bytes, from byte ``first`` of a block's shared memory on."""

    memory: Buffer
    first: int
    rows: int
    width: int
    stages: int

    @property
    def end(self) -> int:
        """The first byte behind the tiles."""
        return self.first + self.stages * self.rows * self.width

    def stage(self, index: Expr) -> Expr:
        """Where a stage begins."""
        return bind(self.first + index * (self.rows * self.width))

    def offset(self, row: Expr, column: Expr) -> Expr:
        """Where byte ``column`` of a row lies within a stage, its chunks swapped as the module says."""
        turn = tirx.floordiv(row, _LINE // self.width)
        chunk = tirx.floordiv(column, CHUNK) ^ tirx.floormod(turn, self.width // CHUNK)
        return row * self.width + chunk * CHUNK + tirx.floormod(column, CHUNK)

    def place(self, stage: Expr, row: Expr, column: Expr) -> Expr:
        """The address of byte ``column`` of a row of the stage that begins at ``stage``."""
        return T.address_of(self.memory[stage + self.offset(row, column)])

    def copy_whole(
        self,
        device: Device,
        source: Buffer,
        first: Expr,
        stage: Expr,
        thread: Expr,
        threads: int,
        wanted: Expr = True,
    ) -> None:
        """Ask for a whole tile whose rows lie behind one another in ``source``, from element ``first`` on, where ``wanted``."""
        size, item = self.rows * self.width, item_bytes(str(source.dtype))
        base = self.stage(stage)
        for start in range(0, size, threads * CHUNK):
            offset = bind(thread * CHUNK + start)
            row, column = tirx.floordiv(offset, self.width), tirx.floormod(offset, self.width)
            target = self.place(base, row, column)
            address = T.address_of(source[first + tirx.floordiv(offset, item)])
            there = wanted
            if size - start < threads * CHUNK:
                there = tirx.all(wanted, offset < size)
            if there is True:
                device.copy(target, address, CHUNK)
                continue
            with T.If(there), T.Then():
                device.copy(target, address, CHUNK)
