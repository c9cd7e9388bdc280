"""Convolution and linear on sparse tensor cores: weights pruned 2:4, half the products of ``conv``; int8 with the same sums.

``y^T = W x^T``: an implicit matrix product like ``conv``, its roles exchanged, since only the first operand may be sparse.
Windows of x and the output's way out are those of ``conv``; a step is one ``mma.sp`` deep, ``STEP`` bytes of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.conv_plan import STEP, ConvPlan
from graphopt.backends.cuda.conv_store import ConvStore, Result
from graphopt.backends.cuda.conv_windows import BlockPlace, Windows
from graphopt.backends.cuda.device import synchronize
from graphopt.backends.cuda.epilogue import int32
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.pipeline import Ring
from graphopt.backends.cuda.shared_tile import CHUNK, SharedTile, block_memory
from graphopt.backends.cuda.sparse_fragments import (
    PIXELS,
    Pixels,
    SparseDevice,
    Weights,
    multiply,
    sums_of,
)
from graphopt.backends.cuda.sparse_pack import FRAGMENT_BYTES, ROWS
from graphopt.backends.cuda.sparse_plan import SparseTile
from graphopt.backends.cuda.stream import accumulators


def sparse_conv(plan: ConvPlan, arch: Arch) -> PrimFunc:
    """The kernel of packed constants: ``(x, weight, bias, multiplier, [residual], y)`` of integers (``pack_sparse``),
    ``(x, weight, bias, [residual], y)`` of float16 (``pack_sparse_float``).
    """
    workload, product = plan.workload, plan.product
    x, y = workload.x, workload.y
    shape = (
        f"{y.height}x{y.width}x{x.channels}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    )
    key = (replace(workload, x=replace(x, fill=0), y=replace(y, fill=0)), plan.tile, arch.name)
    name = kernel_name("cuda_sparse", shape, key)
    weight_bytes = plan.padded_channels // ROWS * plan.steps * FRAGMENT_BYTES
    arguments = [
        activation("x", x),
        Argument("weight", (weight_bytes // product.item_bytes,), product.weight),
        Argument("bias", (plan.padded_channels,), product.sums),
        *(
            [Argument("multiplier", (plan.padded_channels,), "float32")]
            if product.is_integer
            else []
        ),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    return build(name, arguments, lambda batch, flats: _Block(plan, arch, batch, flats).emit())


class _Block:
    """One thread block; shared memory holds the stages of x, then those of the weight, fragment by fragment."""

    def __init__(self, plan: ConvPlan, arch: Arch, batch: Expr, flats: Sequence[Buffer]) -> None:
        assert isinstance(plan.tile, SparseTile)
        self.plan, self.tile, self.flats = plan, plan.tile, flats
        self.device = SparseDevice(arch)
        self.outputs = batch * plan.pixels

    def emit(self) -> None:
        plan, tile = self.plan, self.tile
        blocks = ceil_div(self.outputs, tile.rows) * plan.column_tiles
        with (
            T.launch_thread("blockIdx.x", blocks) as block,
            T.launch_thread("threadIdx.x", tile.threads) as thread,
        ):
            self.column_tile = bind(tirx.floormod(block, plan.column_tiles))
            first_output = bind(tirx.floordiv(block, plan.column_tiles) * tile.rows)
            first_channel = bind(self.column_tile * tile.columns)
            self.place = BlockPlace(thread, first_output, first_channel, self.outputs)
            shared = block_memory(plan.shared_bytes)
            self.x_tile = SharedTile(shared, 0, tile.rows, STEP, tile.stages)
            # fragments are read lane by lane: rows of one chunk, which none is swapped with
            chunks = tile.columns // ROWS * FRAGMENT_BYTES // CHUNK
            self.w_tile = SharedTile(shared, self.x_tile.end, chunks, CHUNK, tile.stages)
            sums = self._main_loop()
            ConvStore(plan, self.place, self.flats, shared).emit(self._results(sums))

    def _main_loop(self) -> Buffer:
        """The sums of products in the thread's registers."""
        device, steps, stages, tile = self.device, self.plan.steps, self.tile.stages, self.tile
        sums = accumulators(tile.warp_rows * tile.warp_columns // 32, self.plan.product.sums, 0)
        x = View(self.plan.workload.x, self.flats[0])
        windows = Windows(self.plan, device, self.place, x, self.x_tile)
        lane = bind(tirx.floormod(self.place.thread, 32))
        warp_row, warp_column = self._warp()
        weights = Weights(device, self.w_tile, lane, warp_column, tile.warp_columns)
        pixels = Pixels(device, self.x_tile, lane, warp_row, tile.warp_rows)
        for stage in range(stages - 1):
            if stage < steps:
                self._copy(windows, int32(stage), int32(stage), True)
            device.commit()
        reading, writing = Ring(0, stages), Ring(stages - 1, stages)
        with T.serial(0, steps) as step:
            device.wait(stages - 2)
            synchronize()
            # no fragments of a second step fit beside 128 sums: those of other warps hide that these are waited for
            weights.load(self.w_tile.stage(reading.stage))
            pixels.load(self.x_tile.stage(reading.stage))
            later = bind(step + (stages - 1))
            self._copy(windows, later, writing.stage, later < steps)
            device.commit()
            reading.advance()
            writing.advance()
            multiply(device, self.plan.product, sums, weights, pixels)
        device.wait(0)
        synchronize()
        return sums

    def _copy(self, windows: Windows, step: Expr, stage: Expr, wanted: Expr) -> None:
        """Ask for step ``step`` of both tiles, where ``wanted``."""
        windows.copy(step, stage, wanted)
        size = self.w_tile.rows * CHUNK
        elements = size // self.plan.product.item_bytes
        source = bind((self.column_tile * self.plan.steps + step) * elements)
        thread, threads = self.place.thread, self.tile.threads
        self.w_tile.copy_whole(self.device, self.flats[1], source, stage, thread, threads, wanted)

    def _warp(self) -> tuple[Expr, Expr]:
        """First row and column of the warp within the tile."""
        row, column = split(tirx.floordiv(self.place.thread, 32), self.tile.warps[1])
        return bind(row * self.tile.warp_rows), bind(column * self.tile.warp_columns)

    def _results(self, sums: Buffer) -> list[Result]:
        lane = bind(tirx.floormod(self.place.thread, 32))
        counts = self.tile.warp_columns // ROWS, self.tile.warp_rows // PIXELS
        mine = sums_of(lane, *self._warp(), *counts)
        return [Result(at.row, at.column, sums[at.register]) for at in mine]
