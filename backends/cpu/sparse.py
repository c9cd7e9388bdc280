"""Sparse convolution and linear: ``y[o] = epilogue(sum over o's non-zero blocks of x[tap] * w + bias)``.

A tile of vectors of neighbouring pixels stays in registers while the blocks of one output channel go by; each is broadcast and
multiplied by the pixels that its tap reads. Activations are planar (``Layout.order``), so that a vector is 16 pixels of 4
bytes, or of a float; 4 channels of bytes leave as whole planes. Zeros cost nothing, and neither does their pattern.
Loops: images, chunks of lines, shares of the output planes; tiles of the chunk, planes, channels.
"""

from __future__ import annotations

import hashlib

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.sparse_gather import Gather
from graphopt.backends.cpu.sparse_plan import SparseChoice, plan_sparse
from graphopt.backends.cpu.sparse_products import AHEAD, Products
from graphopt.backends.cpu.sparse_store import SparseStore, Tile
from graphopt.backends.cpu.workload import Conv2d, Layout


def function_name(workload: Conv2d, isa: Isa, threads: int, choice: SparseChoice | None) -> str:
    """``sparse_u8s8_3x3s2_56x56x64_128_<hash>``: legible, unique."""
    x, y = workload.x, workload.y
    kinds = "u8s8" if x.dtype == "uint8" else "f32"
    stride = "" if workload.stride == (1, 1) else f"s{workload.stride[0]}"
    digest = hashlib.sha256(f"{workload!r} {isa.name} {threads} {choice!r}".encode()).hexdigest()
    kernel = f"{workload.kernel[0]}x{workload.kernel[1]}"
    shape = f"{x.height}x{x.width}x{x.channels}"
    return f"sparse_{kinds}_{kernel}{stride}_{shape}_{y.channels}_{digest[:8]}"


class _Kernel:
    """One kernel under construction."""

    def __init__(
        self, workload: Conv2d, isa: Isa, threads: int, choice: SparseChoice | None
    ) -> None:
        self.workload = workload
        self.isa = isa
        self.threads = threads
        self.name = function_name(workload, isa, threads, choice)
        self.plan = plan_sparse(workload, isa, choice)
        self.integer = workload.x.dtype == "uint8"
        self.dtype = "int32" if self.integer else "float32"

    def build(self) -> tvm.tirx.PrimFunc:
        with emit.kernel(self.name) as builder:
            self._arguments()
            self._tasks()
        return builder.get()

    def _arguments(self) -> None:
        workload, plan = self.workload, self.plan
        batch: Expr = workload.x.batch
        self.batch = tirx.Var("n", "int64") if batch is None else batch

        def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
            return T.arg(name, T.buffer(shape, dtype))

        def activations(name: str, layout: Layout) -> Buffer:
            return argument(name, (self.batch, *layout.shape), layout.dtype)

        x = activations("x", workload.x)
        stored = tirx.Var(
            "stored", "int64"
        )  # layers of one shape share the code, whatever their zeros
        self.values = argument("values", (stored,), self.dtype)
        self.bias = argument("bias", (plan.rows,), self.dtype)
        self.multiplier = None
        if self.integer:
            self.multiplier = argument("multiplier", (plan.rows,), "float32")
        self.taps = argument("taps", (stored + AHEAD,), "uint16")
        self.starts = argument("starts", (plan.parts * plan.rows + 1,), "int32")
        residual = None
        if workload.residual is not None:
            residual = activations("residual", workload.residual)
        y = activations("y", workload.y)
        self.x, self.y = emit.flat(x), emit.flat(y)
        self.residual = None if residual is None else emit.flat(residual)
        self.store = SparseStore(plan, self.isa, self.y, self.residual)

    def _splits(self) -> int:
        """Tasks that share a chunk's output planes, each of which gathers for itself."""
        plan = self.plan
        tasks = plan.chunks * (self.workload.x.batch or 1)
        if plan.flat:
            tasks *= plan.tiles_wide
        if self.threads == 1 or tasks % self.threads == 0 or tasks >= 4 * self.threads:
            return 1
        return min(self.threads, self.workload.y.planes)

    def _tasks(self) -> None:
        plan, splits = self.plan, self._splits()
        across = (
            plan.tiles_wide if plan.flat else 1
        )  # where nothing is gathered every tile is a task
        planes = self.workload.y.planes
        with emit.loop(self.batch * (plan.chunks * across * splits), self.threads > 1) as task:
            share = bind(emit.floor_mod(task, splits))
            chunk = bind(emit.floor_div(task, splits))
            image = bind(emit.floor_div(chunk, plan.chunks * across))
            chunk = bind(emit.floor_mod(chunk, plan.chunks * across))
            low = bind(emit.floor_div(share * planes, splits))
            high = bind(emit.floor_div((share + 1) * planes, splits))
            if plan.flat:
                self._flat_tile(image, chunk, low, high)
            else:
                self._chunk(image, chunk, low, high)

    def _flat_tile(self, image: Expr, tile: Expr, low: Expr, high: Expr) -> None:
        plan, x = self.plan, self.workload.x
        pixel = bind(self._vector(tile) * plan.lanes)
        start = bind(image * (x.planes * x.plane_pixels) + pixel)
        if not plan.copies:
            self._tile(self.x, start, Tile(image, pixel), low, high)
            return
        size = x.planes * plan.map_pixels * x.group
        copied = T.alloc_buffer((size,), x.dtype, scope="global")
        Gather(plan, self.isa, self.x, copied).tile(start)
        self._tile(copied, 0, Tile(image, pixel), low, high)

    def _vector(self, tile: Expr) -> Expr:
        """The first vector of a tile of a map in line; the last tile overlaps its neighbour."""
        return emit.minimum(tile * self.plan.wide, self.plan.vectors_wide - self.plan.wide)

    def _chunk(self, image: Expr, chunk: Expr, low: Expr, high: Expr) -> None:
        plan = self.plan
        last = max(0, plan.height - plan.chunk_lines)
        first_line = bind(emit.minimum(chunk * plan.chunk_lines, last))
        size = plan.gathered_pixels * self.workload.x.group
        gathered = T.alloc_buffer((size,), self.workload.x.dtype, scope="global")
        Gather(plan, self.isa, self.x, gathered).chunk(image, first_line)
        with emit.loop(plan.chunk) as down, emit.loop(plan.tiles_wide) as across:
            line = bind(down * plan.high)
            column: Expr = 0
            if plan.in_line:
                column = bind(self._vector(across) * plan.lanes)
            elif plan.tiles_wide > 1:
                step = plan.wide * plan.lanes
                column = bind(emit.minimum(across * step, plan.width - step))
            start = bind(line * plan.row_pitch + column)
            pixel = bind((first_line + line) * plan.width + column)
            self._tile(gathered, start, Tile(image, pixel), low, high)

    def _tile(self, source: Buffer, start: Expr, tile: Tile, low: Expr, high: Expr) -> None:
        """One register tile of all output planes from ``low`` to ``high``."""
        plan, lanes, group = self.plan, self.plan.lanes, self.workload.y.group
        waiting = self._first_parts(source, start, low * group, high * group)
        last = (plan.parts - 1) * plan.rows
        with T.serial(low, high) as plane:
            self.store.begin(tile, plane)
            for channel in range(group):
                row = bind(plane * group + channel)
                multiplier = None
                if self.multiplier is not None:
                    multiplier = bind(emit.broadcast(emit.load(self.multiplier, row, 1), lanes))
                sums = self._sums(source, start, row, last, self._waiting(waiting, row))
                self.store.channel(channel, sums, multiplier)
            self.store.finish()

    def _first_parts(self, source: Buffer, start: Expr, low: Expr, high: Expr) -> Buffer | None:
        """The sums over all parts of the input planes but the last, in memory; None where there is one part."""
        plan, lanes = self.plan, self.plan.lanes
        if plan.parts == 1:
            return None
        size = plan.rows * plan.vectors * lanes
        waiting = T.alloc_buffer((size,), self.dtype, scope="global")

        def part(number: Expr, begins: bool) -> None:
            with T.serial(low, high) as row:
                before = None if begins else self._waiting(waiting, row)
                sums = self._sums(source, start, row, number * plan.rows, before)
                for i, total in enumerate(sums):
                    emit.store(waiting, (row * plan.vectors + i) * lanes, total)

        part(0, True)
        if plan.parts > 2:
            with T.serial(1, plan.parts - 1) as number:
                part(number, False)
        return waiting

    def _waiting(self, waiting: Buffer | None, row: Expr) -> list[Expr] | None:
        """A row's sums so far."""
        if waiting is None:
            return None
        vectors, lanes = self.plan.vectors, self.plan.lanes
        return [
            bind(emit.load(waiting, (row * vectors + i) * lanes, lanes)) for i in range(vectors)
        ]

    def _sums(
        self, source: Buffer, start: Expr, row: Expr, part: Expr, before: list[Expr] | None
    ) -> list[Expr]:
        """A part's blocks of one output channel times the pixels of the tile, added to what is there or to the bias."""
        if before is None:
            bias = bind(emit.broadcast(emit.load(self.bias, row, 1), self.plan.lanes))
            before = [bias] * self.plan.vectors
        products = Products(self.plan, self.isa, (self.values, self.taps, self.starts), source)
        return products.sums(start, part + row, before)


def sparse(
    workload: Conv2d, isa: Isa, threads: int, choice: SparseChoice | None = None
) -> tvm.tirx.PrimFunc:
    """The kernel of a workload whose layouts are planar: a PrimFunc on ``x``, the arrays of ``pack_sparse``, ``[residual], y``."""
    return _Kernel(workload, isa, threads, choice).build()
