"""Operands and sums of a warp's ``mma.sp``: 16 output channels pruned 2:4 by 8 pixels, 64 bytes of k at once.

The weight is the first operand, the only one that may be sparse, so that channels are the product's rows and pixels its
columns. Its fragments lie in shared memory lane by lane as ``sparse_pack`` made them; those of x take one ``ldmatrix.x4``.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.fragments import Sum
from graphopt.backends.cuda.products import Product
from graphopt.backends.cuda.shared_tile import CHUNK, SharedTile
from graphopt.backends.cuda.sparse_pack import FRAGMENT_BYTES, ROWS, WEIGHT_BYTES

PIXELS = 8  # of one product
_REGISTERS = 4  # of either operand, and of the sums

# ordered_metadata (PTX 8.5): indices of a group increase. ptxas 13 warns that the form without it will be slow on later chips.
_MMA = """\
  asm volatile("mma.sp::ordered_metadata.sync.aligned.{shape} "
               "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9, %10, %11}}, {{%0, %1, %2, %3}}, %12, 0x0;"
               : "+{kind}"(c[0]), "+{kind}"(c[1]), "+{kind}"(c[2]), "+{kind}"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                 "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
"""
# By the names of ``products``: the weight is the first operand
SHAPES = {
    "u8": "m16n8k64.row.col.s32.s8.u8.s32",
    "s8": "m16n8k64.row.col.s32.s8.s8.s32",
    "f16": "m16n8k32.row.col.f32.f16.f16.f32",
}
_LOAD = """\
  uint4 words = *(const uint4*)from;
  d[0] = words.x; d[1] = words.y; d[2] = words.z; d[3] = words.w;
"""


class SparseDevice(Device):
    """With the functions of sparse products."""

    def multiply_sparse(self, product: Product, c: Expr, a: Expr, b: Expr, metadata: Expr) -> None:
        """``c[16, 8] += a[16, k] * b[k, 8]`` over a warp, k of 64 bytes, a kept 2:4; registers as ``mma.sp.m16n8`` has them."""
        name = f"graphopt_sparse_mma_{product.name}"
        sums, kind = ("int", "r") if product.is_integer else ("float", "f")
        signature = f"void {name}({sums}* c, const unsigned* a, const unsigned* b, uint e)"
        body = _MMA.format(shape=SHAPES[product.name], kind=kind)
        self._call(name, signature, body, c, a, b, metadata)

    def load_words(self, registers: Expr, source: Expr) -> None:
        """Four words from 16 aligned bytes of shared memory."""
        signature = "void graphopt_sparse_words(unsigned* d, const uchar* from)"
        self._call("graphopt_sparse_words", signature, _LOAD, registers, source)


class Weights:
    """The fragments of ``channels`` rows from ``first_channel`` of a tile on, of one step."""

    def __init__(
        self, device: SparseDevice, tile: SharedTile, lane: Expr, first_channel: Expr, channels: int
    ) -> None:
        self.device, self.tile, self.lane = device, tile, lane
        self.count = channels // ROWS
        self.first = bind(tirx.floordiv(first_channel, ROWS) * FRAGMENT_BYTES)
        self.registers = T.alloc_buffer((self.count * _REGISTERS,), "uint32", scope="local")
        self.metadata = T.alloc_buffer((self.count,), "uint32", scope="local")

    def load(self, stage: Expr) -> None:
        """Every fragment of the stage that begins at ``stage``."""
        memory = self.tile.memory
        for i in range(self.count):
            base = bind(stage + self.first + i * FRAGMENT_BYTES)
            source = T.address_of(memory[base + self.lane * CHUNK])
            self.device.load_words(T.address_of(self.registers[_REGISTERS * i]), source)
            word = memory.vload(base + WEIGHT_BYTES + self.lane * 4, "uint8x4")
            T.buffer_store(self.metadata, T.reinterpret("uint32", word), [i])


class Pixels:
    """The fragments of ``pixels`` rows of a tile of windows from ``first_pixel`` on."""

    def __init__(
        self, device: Device, tile: SharedTile, lane: Expr, first_pixel: Expr, pixels: int
    ) -> None:
        self.device, self.tile = device, tile
        self.count = pixels // PIXELS
        # matrix i of a load is 16 bytes of k of eight pixels
        self.row = bind(first_pixel + tirx.floormod(lane, 8))
        self.column = bind(tirx.floordiv(lane, 8) * CHUNK)
        self.registers = T.alloc_buffer((self.count * _REGISTERS,), "uint32", scope="local")

    def load(self, stage: Expr) -> None:
        """64 bytes of every pixel, of the stage that begins at ``stage``."""
        for j in range(self.count):
            place = self.tile.place(stage, self.row + j * PIXELS, self.column)
            self.device.load_matrices(T.address_of(self.registers[_REGISTERS * j]), place)


def multiply(
    device: SparseDevice, product: Product, sums: Buffer, weights: Weights, pixels: Pixels
) -> None:
    """The warp's products of the step whose fragments were loaded."""
    for i in range(weights.count):
        for j in range(pixels.count):
            device.multiply_sparse(
                product,
                T.address_of(sums[(i * pixels.count + j) * _REGISTERS]),
                T.address_of(weights.registers[_REGISTERS * i]),
                T.address_of(pixels.registers[_REGISTERS * j]),
                weights.metadata[i],
            )


def sums_of(
    lane: Expr, first_pixel: Expr, first_channel: Expr, weights: int, pixels: int
) -> list[Sum]:
    """The registers of ``weights x pixels`` products, four each: a pixel is a row of the tile, a channel its column.

    They come column by column; the sums of a column, and those of a row, have the same expression for it.
    """
    row = bind(first_pixel + tirx.floormod(lane, 4) * 2)
    column = bind(first_channel + tirx.floordiv(lane, 4))
    rows = [bind(row + j * PIXELS + odd) for j in range(pixels) for odd in range(2)]
    columns = [bind(column + i * 8) for i in range(2 * weights)]
    found = []
    for i, at_column in enumerate(columns):
        for j, at_row in enumerate(rows):
            register = (i // 2 * pixels + j // 2) * _REGISTERS + i % 2 * 2 + j % 2
            found.append(Sum(at_row, at_column, register))
    return found
