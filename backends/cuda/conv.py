"""int8 convolution and linear as an implicit matrix product on tensor cores: ``uint8 x int8 -> int32``, exact.

A block makes ``rows x columns`` outputs (``conv_plan``). Tiles of x and of the weight go to shared memory in ``STAGES``
stages; a row of a tile is ``STEP`` = 64 bytes in four chunks of 16, of which row r holds chunk c at ``c ^ (r / 2 % 4)``: eight
rows that ``ldmatrix`` reads together then lie in different banks. Where a window leaves the map, or a row of the tile is
past the last output, the tile holds the zero point, which the bias takes back. The epilogue rounds in the registers of the
product, passes the bytes through shared memory so that whole words go out, and adds a residual on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.conv_plan import STAGES, STEP, ConvPlan
from graphopt.backends.cuda.device import Device, synchronize
from graphopt.backends.cuda.epilogue import finish, int32, quantized_add, requantize
from graphopt.backends.cuda.memory import View, access, activation, build, ceil_div, split

CHUNK = 16  # bytes that ldmatrix takes of a row
MMA_ROWS, MMA_COLUMNS, MMA_DEPTH = 16, 8, 32
_OUTPUT_PAD = 16  # bytes between rows of staged outputs, against bank conflicts


def conv(plan: ConvPlan, arch: Arch) -> PrimFunc:
    """The kernel ``(x, weight, bias, multiplier, [residual], y)`` of packed constants; see ``pack_conv``."""
    workload = plan.workload
    x, y = workload.x, workload.y
    shape = (
        f"{y.height}x{y.width}x{x.channels}x{y.channels}_{workload.kernel[0]}x{workload.kernel[1]}"
    )
    key = (replace(workload, x=replace(x, fill=0), y=replace(y, fill=0)), plan.tile, arch.name)
    name = kernel_name("cuda_conv", shape, key)
    arguments = [
        activation("x", x),
        Argument("weight", (plan.padded_channels * plan.steps * STEP,), "int8"),
        Argument("bias", (plan.padded_channels,), "int32"),
        Argument("multiplier", (plan.padded_channels,), "float32"),
        *([] if workload.residual is None else [activation("residual", workload.residual)]),
        activation("y", y),
    ]
    return build(name, arguments, lambda batch, flats: _Block(plan, arch, batch, flats).emit())


@dataclass(frozen=True)
class _Row:
    """One row of the x tile as its copying threads see it: the window's origin, where its image begins, if it exists."""

    exists: Expr
    image: Expr
    top: Expr
    left: Expr


class _Block:
    """One thread block; ``at`` bytes from ``shared`` on: STAGES tiles of x, then STAGES of the weight."""

    def __init__(self, plan: ConvPlan, arch: Arch, batch: Expr, flats: Sequence[Buffer]) -> None:
        self.plan, self.tile, self.workload = plan, plan.tile, plan.workload
        self.device = Device(arch)
        self.outputs = batch * plan.pixels
        self.x = View(self.workload.x, flats[0])
        self.weight, self.bias, self.multiplier = flats[1:4]
        self.y = View(self.workload.y, flats[-1])
        self.residual: View | None = None
        if self.workload.residual is not None:
            self.residual = View(self.workload.residual, flats[4])
        self.row_tiles = plan.tile.warp_rows // MMA_ROWS
        self.column_tiles = plan.tile.warp_columns // MMA_COLUMNS

    def emit(self) -> None:
        plan, tile = self.plan, self.tile
        blocks = ceil_div(self.outputs, tile.rows) * plan.column_tiles
        with (
            T.launch_thread("blockIdx.x", blocks) as block,
            T.launch_thread("threadIdx.x", tile.threads) as thread,
        ):
            self.thread = thread
            self.column_tile = bind(tirx.floormod(block, plan.column_tiles))
            self.first_row = bind(tirx.floordiv(block, plan.column_tiles) * tile.rows)
            self.shared = T.alloc_buffer((tile.shared_bytes,), "uint8", scope="shared")
            self._main_loop()
            if self.workload.y.dtype == "float32":
                self._store_floats()
            else:
                self._stage_bytes()
                synchronize()
                self._store_bytes()

    def _main_loop(self) -> None:
        device, steps = self.device, self.plan.steps
        count = self.row_tiles * self.column_tiles * 4
        self.sums = T.alloc_buffer((count,), "int32", scope="local")
        for i in range(count):
            T.buffer_store(self.sums, int32(0), [i])
        self._prepare_rows()
        for stage in range(STAGES - 1):
            if stage < steps:
                self._copy(stage, stage)
            device.commit()
        with T.serial(0, steps) as step:
            device.wait(STAGES - 2)
            synchronize()
            later = bind(step + (STAGES - 1))
            with T.If(later < steps), T.Then():
                self._copy(later, tirx.floormod(later, STAGES))
            device.commit()
            self._multiply(bind(tirx.floormod(step, STAGES)))
        device.wait(0)
        synchronize()

    def _prepare_rows(self) -> None:
        """Which rows of the x tile this thread copies, and the windows they stand for."""
        tile, vector, w = self.tile, self.plan.vector, self.workload
        per_row = STEP // vector
        self.copy_column = bind(tirx.floormod(self.thread, per_row) * vector)
        self.copy_row = bind(tirx.floordiv(self.thread, per_row))
        self.row_step = tile.threads // per_row
        self.rows = []
        for i in range(tile.rows // self.row_step):
            output = bind(self.first_row + self.copy_row + i * self.row_step)
            image, row, column = split(output, w.y.height, w.y.width)
            self.rows.append(
                _Row(
                    bind(output < self.outputs),
                    bind(image * w.x.height),
                    bind(row * w.stride[0] - w.padding[0]),
                    bind(column * w.stride[1] - w.padding[1]),
                )
            )

    def _copy(self, step: Expr, stage: Expr) -> None:
        """Ask for step ``step`` of both tiles."""
        plan, tile, w = self.plan, self.tile, self.workload
        k = bind(self.copy_column + step * STEP)
        tap_row, tap_column, channel = self._tap(k)
        down, right = bind(tap_row * w.dilation[0]), bind(tap_column * w.dilation[1])
        base = bind(stage * (tile.rows * STEP))
        for i, row in enumerate(self.rows):
            line, column = bind(row.top + down), bind(row.left + right)
            inside = tirx.all(
                row.exists,
                k < plan.depth,
                line >= 0,
                line < w.x.height,
                column >= 0,
                column < w.x.width,
            )
            target = self._place(base, self.copy_row + i * self.row_step, self.copy_column)
            pixel = (row.image + line) * w.x.width + column
            with T.If(inside):
                with T.Then():
                    source = T.address_of(self.x.flat[self.x.at(pixel, channel)])
                    self.device.copy(target, source, plan.vector)
                with T.Else():
                    word = tirx.const(w.x_zero_point * 0x01010101, "uint32")
                    self.device.fill(target, word, plan.vector)
        self._copy_weight(step, stage)

    def _tap(self, k: Expr) -> list[Expr]:
        """Tap row, tap column and channel of an element of k."""
        if self.workload.kernel == (1, 1):
            return [int32(0), int32(0), k]
        return split(k, self.workload.kernel[1], self.plan.tap_channels)

    def _copy_weight(self, step: Expr, stage: Expr) -> None:
        tile = self.tile
        base = bind(STAGES * tile.rows * STEP + stage * (tile.columns * STEP))
        size = tile.columns * STEP
        source = bind((self.column_tile * self.plan.steps + step) * size)
        for first in range(0, size, tile.threads * CHUNK):
            offset = bind(self.thread * CHUNK + first)
            target = self._place(base, tirx.floordiv(offset, STEP), tirx.floormod(offset, STEP))
            address = T.address_of(self.weight[source + offset])
            if size - first >= tile.threads * CHUNK:
                self.device.copy(target, address, CHUNK)
                continue
            with T.If(offset < size), T.Then():
                self.device.copy(target, address, CHUNK)

    def _place(self, base: Expr, row: Expr, column: Expr) -> Expr:
        """The address of byte ``column`` of a tile's row, its chunks swapped as the module says."""
        chunk = tirx.floordiv(column, CHUNK) ^ tirx.floormod(tirx.floordiv(row, 2), STEP // CHUNK)
        return T.address_of(
            self.shared[base + row * STEP + chunk * CHUNK + tirx.floormod(column, CHUNK)]
        )

    def _multiply(self, stage: Expr) -> None:
        """The warp's products of one stage."""
        tile, device = self.tile, self.device
        a = T.alloc_buffer((self.row_tiles * 4,), "uint32", scope="local")
        b = T.alloc_buffer((self.column_tiles * 2,), "uint32", scope="local")
        lane = bind(tirx.floormod(self.thread, 32))
        matrix, line = bind(tirx.floordiv(lane, 8)), bind(tirx.floormod(lane, 8))
        warp_row, warp_column = self._warp()
        x_base = bind(stage * (tile.rows * STEP))
        w_base = bind(STAGES * tile.rows * STEP + stage * (tile.columns * STEP))
        # matrices of x: rows 0-7 and 8-15 of the first 16 bytes, then of the others
        x_row = bind(warp_row + tirx.floormod(matrix, 2) * 8 + line)
        x_column = bind(tirx.floordiv(matrix, 2) * CHUNK)
        # of the weight: both halves of k for 8 columns, then for the next 8
        w_row = bind(warp_column + tirx.floordiv(matrix, 2) * 8 + line)
        w_column = bind(tirx.floormod(matrix, 2) * CHUNK)
        for k in range(0, STEP, MMA_DEPTH):
            for i in range(self.row_tiles):
                place = self._place(x_base, x_row + i * MMA_ROWS, x_column + k)
                device.load_matrices(T.address_of(a[4 * i]), place)
            for j in range(0, self.column_tiles, 2):
                place = self._place(w_base, w_row + j * MMA_COLUMNS, w_column + k)
                device.load_matrices(T.address_of(b[2 * j]), place)
            for i in range(self.row_tiles):
                for j in range(self.column_tiles):
                    c = T.address_of(self.sums[(i * self.column_tiles + j) * 4])
                    device.multiply(c, T.address_of(a[4 * i]), T.address_of(b[2 * j]))

    def _warp(self) -> tuple[Expr, Expr]:
        """First row and column of the warp within the tile."""
        row, column = split(tirx.floordiv(self.thread, 32), self.tile.warps[1])
        return bind(row * self.tile.warp_rows), bind(column * self.tile.warp_columns)

    def _results(self) -> list[tuple[Expr, Expr, list[Expr]]]:
        """Row within the tile, column within the tile and the sums of two neighbouring columns, for every pair."""
        lane = bind(tirx.floormod(self.thread, 32))
        warp_row, warp_column = self._warp()
        row = bind(warp_row + tirx.floordiv(lane, 4))
        column = bind(warp_column + tirx.floormod(lane, 4) * 2)
        found = []
        for j in range(self.column_tiles):
            for i in range(self.row_tiles):
                for half in range(2):
                    first = (i * self.column_tiles + j) * 4 + half * 2
                    sums = [self.sums[first], self.sums[first + 1]]
                    found.append((row + i * MMA_ROWS + half * 8, column + j * MMA_COLUMNS, sums))
        return found

    def _affine(self, column: Expr, total: Expr) -> tuple[Expr, Expr]:
        """The sum with its bias, and the multiplier, of a column of the tile."""
        channel = self.column_tile * self.tile.columns + column
        return bind(total + self.bias[channel]), bind(self.multiplier[channel])

    def _store_floats(self) -> None:
        epilogue = self.workload.epilogue
        for row, column, sums in self._results():
            output = bind(self.first_row + row)
            for i, total in enumerate(sums):
                channel = bind(self.column_tile * self.tile.columns + column + i)
                value, multiplier = self._affine(column + i, total)
                result = finish(epilogue, value, multiplier, int32(0))
                inside = tirx.all(output < self.outputs, channel < self.workload.y.channels)
                with T.If(inside), T.Then():
                    T.buffer_store(self.y.flat, result, [self.y.at(output, channel)])

    def _stage_bytes(self) -> None:
        """Round the sums and put the bytes where the tiles were."""
        parameters = self.workload.epilogue.requantize
        assert parameters is not None
        pitch = self.tile.columns + _OUTPUT_PAD
        for row, column, sums in self._results():
            place = bind(row * pitch + column)
            for i, total in enumerate(sums):
                value, multiplier = self._affine(column + i, total)
                q = requantize(parameters, value, multiplier)
                T.buffer_store(self.shared, T.cast(q, "uint8"), [place + i])

    def _store_bytes(self) -> None:
        """Rows of staged bytes to memory, a residual added."""
        tile, y = self.tile, self.y
        layouts = [y.layout] if self.residual is None else [y.layout, self.residual.layout]
        width = access(*layouts)
        per_row = tile.columns // width
        pitch = tile.columns + _OUTPUT_PAD
        values = T.alloc_buffer((width,), "uint8", scope="local")
        total = tile.rows * per_row
        for first in range(0, total, tile.threads):
            row, part = split(self.thread + first, per_row)
            output = bind(self.first_row + row)
            channel = bind(self.column_tile * tile.columns + part * width)
            inside = tirx.all(output < self.outputs, channel < y.stored_channels)
            if total - first < tile.threads:
                inside = tirx.all(inside, self.thread + first < total)
            with T.If(inside), T.Then():
                self._move(values, self.shared, bind(row * pitch + part * width), width)
                if self.residual is not None:
                    self._add_residual(values, output, channel, width)
                place = y.at(output, channel)
                T.add_to_parent(y.flat.vstore(place, values.vload(0, _bytes(width))))

    def _move(self, values: Buffer, source: Buffer, offset: Expr, width: int) -> None:
        T.add_to_parent(values.vstore(0, source.vload(offset, _bytes(width))))

    def _add_residual(self, values: Buffer, output: Expr, channel: Expr, width: int) -> None:
        add = self.workload.epilogue.residual_add
        assert add is not None
        assert self.residual is not None
        others = T.alloc_buffer((width,), "uint8", scope="local")
        self._move(others, self.residual.flat, self.residual.at(output, channel), width)
        for i in range(width):
            q = quantized_add(add, T.cast(values[i], "int32"), T.cast(others[i], "int32"))
            T.buffer_store(values, T.cast(q, "uint8"), [i])


def _bytes(count: int) -> str:
    return "uint8" if count == 1 else f"uint8x{count}"
