"""Convolution and linear as an implicit matrix product on tensor cores: bytes to int32, exact; float16 and tf32 to float32.

A block makes ``rows x columns`` outputs (``conv_plan``). Tiles of x (``conv_windows``) and of the weight go to shared memory in
stages, ``STEP`` bytes of k each; warps multiply them (``fragments``) and the sums go out through ``conv_store``.
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
from graphopt.backends.cuda.conv_sums import store_sums, sums_argument
from graphopt.backends.cuda.conv_windows import BlockPlace, Windows
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.fragments import MMA_COLUMNS, MMA_ROWS, Operand, sums_of
from graphopt.backends.cuda.memory import View, activation, build, ceil_div, split
from graphopt.backends.cuda.pipeline import pipeline
from graphopt.backends.cuda.products import FRAGMENT_BYTES
from graphopt.backends.cuda.shared_tile import SharedTile, block_memory
from graphopt.backends.cuda.stream import accumulators


def conv(plan: ConvPlan, arch: Arch) -> PrimFunc:
    """The kernel of packed constants: ``(x, weight, bias, multiplier, [residual], y)`` of integers (``pack_conv``),
    ``(x, weight, bias, [residual], y)`` of floats (``pack_float_conv``), ``(x, weight, sums)`` of a part of the steps
    (``conv_sums``).
    """
    workload, product = plan.workload, plan.product
    assert product.name in arch.products
    x, y = workload.x, workload.y
    shape = (
        f"{y.height}x{y.width}x{x.channels}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    )
    plain = replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))
    name = kernel_name("cuda_conv", shape, (plain, plan.tile, plan.splits, product, arch.name))
    channels = plan.padded_channels
    operands = [
        activation("x", x),
        Argument("weight", (channels * plan.steps * plan.step_elements,), product.weight),
    ]
    if plan.splits > 1:
        arguments = [*operands, sums_argument(plan)]
        return build(name, arguments, lambda batch, flats: _Block(plan, arch, batch, flats).emit())
    arguments = [
        *operands,
        Argument("bias", (channels,), product.sums),
        *([Argument("multiplier", (channels,), "float32")] if product.is_integer else []),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    return build(name, arguments, lambda batch, flats: _Block(plan, arch, batch, flats).emit())


class _Block:
    """One thread block; shared memory holds the stages of x, then those of the weight."""

    def __init__(self, plan: ConvPlan, arch: Arch, batch: Expr, flats: Sequence[Buffer]) -> None:
        self.plan, self.tile, self.flats = plan, plan.tile, flats
        self.device = Device(arch)
        self.outputs = batch * plan.pixels
        self.row_tiles = plan.tile.warp_rows // MMA_ROWS
        self.column_tiles = plan.tile.warp_columns // MMA_COLUMNS

    def emit(self) -> None:
        plan, tile = self.plan, self.tile
        blocks = ceil_div(self.outputs, tile.rows) * plan.column_tiles * plan.splits
        with (
            T.launch_thread("blockIdx.x", blocks) as block,
            T.launch_thread("threadIdx.x", tile.threads) as thread,
        ):
            row_tile, self.column_tile, self.part = split(block, plan.column_tiles, plan.splits)
            first_output = bind(row_tile * tile.rows)
            first_channel = bind(self.column_tile * tile.columns)
            self.place = BlockPlace(thread, first_output, first_channel, self.outputs)
            shared = block_memory(plan.shared_bytes)
            self.x_tile = SharedTile(shared, 0, tile.rows, STEP, tile.stages)
            self.w_tile = SharedTile(shared, self.x_tile.end, tile.columns, STEP, tile.stages)
            sums = self._main_loop()
            results = self._results(sums)
            if plan.splits > 1:
                store_sums(plan, self.place, self.part, self.flats[-1], results)
            else:
                ConvStore(plan, self.place, self.flats, shared).emit(results)

    def _main_loop(self) -> Buffer:
        """The sums of products in the thread's registers."""
        device, tile = self.device, self.tile
        product = self.plan.product
        sums = accumulators(self.row_tiles * self.column_tiles * 4, product.sums, 0)
        x = View(self.plan.workload.x, self.flats[0])
        windows = Windows(self.plan, device, self.place, x, self.x_tile)
        lane = bind(tirx.floormod(self.place.thread, 32))
        warp_row, warp_column = self._warp()
        a = Operand(device, self.x_tile, lane, warp_row, tile.warp_rows, True, product.rounds)
        b = Operand(device, self.w_tile, lane, warp_column, tile.warp_columns, False)
        x_tile, w_tile = self.x_tile, self.w_tile

        steps = self.plan.steps // self.plan.splits
        first_step = bind(self.part * steps)

        def copy(step: Expr, stage: Expr, wanted: Expr) -> None:
            step = bind(first_step + step)
            windows.copy(step, stage, wanted)
            size = tile.columns * self.plan.step_elements
            source = bind((self.column_tile * self.plan.steps + step) * size)
            thread = self.place.thread
            w_tile.copy_whole(device, self.flats[1], source, stage, thread, tile.threads, wanted)

        def load(stage: Expr, part: int, half: int) -> None:
            a.load(x_tile.stage(stage), part, half)
            b.load(w_tile.stage(stage), part, half)

        def multiply(half: int) -> None:
            for i in range(self.row_tiles):
                for j in range(self.column_tiles):
                    c = T.address_of(sums[(i * self.column_tiles + j) * 4])
                    device.multiply(product, c, a.fragment(i, half), b.fragment(j, half))

        parts = STEP // FRAGMENT_BYTES
        pipeline(device, steps, tile.stages, parts, copy, load, multiply)
        return sums

    def _warp(self) -> tuple[Expr, Expr]:
        """First row and column of the warp within the tile."""
        row, column = split(tirx.floordiv(self.place.thread, 32), self.tile.warps[1])
        return bind(row * self.tile.warp_rows), bind(column * self.tile.warp_columns)

    def _results(self, sums: Buffer) -> list[Result]:
        lane = bind(tirx.floormod(self.place.thread, 32))
        mine = sums_of(lane, *self._warp(), self.row_tiles, self.column_tiles)
        return [Result(at.row, at.column, sums[at.register], sums[at.register + 1]) for at in mine]
