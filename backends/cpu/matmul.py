"""Products of activations: ``y[l] = scale * a[l] @ b[l]``, operands read in place through strides.

A tile of ``pixels x vectors`` accumulators runs over the whole depth, as in ``conv``; b is read as it lies where its columns
lie side by side, and else (``q @ k.T``) transposed once per matrix. Last tiles overlap their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.conv_plan import choose_tile
from graphopt.backends.cpu.emit import (
    Accumulators,
    Buffer,
    Expr,
    bind,
    broadcast,
    constant,
    floor_div,
    floor_mod,
    load,
    loop,
    minimum,
    multiply_add,
    store,
)
from graphopt.backends.cpu.fold import narrowed
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import activation_argument, build, kernel_name
from graphopt.backends.cpu.tokens import Matmul, Strided
from graphopt.errors import CompileError

_SHARES = 4  # tasks a thread, where rows are split to give every thread some

Finish = Callable[[int, Expr, Expr, int], None]  # row of the tile, first column, total, lanes


@dataclass(frozen=True)
class Matrix:
    """Element ``(i, j)`` of a flat buffer at ``start + i * row + j * column``."""

    buffer: Buffer
    start: Expr
    row: int
    column: int

    def at(self, i: Expr, j: Expr) -> Expr:
        """The offset of an element."""
        return self.start + i * self.row + j * self.column

    def transposed(self) -> Matrix:
        """Rows as columns."""
        return replace(self, row=self.column, column=self.row)


def matrix(view: Strided, buffer: Buffer, lead: Sequence[Expr]) -> Matrix:
    """The matrix of a view at an index of its leading axes."""
    *outer, row, column = view.strides
    start: Expr = view.offset
    for index, stride in zip(lead, outer, strict=True):
        start = start + index * stride
    return Matrix(buffer, bind(start), row, column)


def unravel(index: Expr, sizes: Sequence[int | None]) -> list[Expr]:
    """A flat index as one a leading axis; the first axis takes what is left."""
    parts: list[Expr] = []
    for size in reversed(sizes[1:]):
        assert size is not None
        parts.append(bind(floor_mod(index, size)))
        index = bind(floor_div(index, size))
    return [index, *reversed(parts)] if sizes else []


def scratch(elements: int) -> Buffer:
    """Working memory of one task."""
    return T.alloc_buffer((elements,), "float32", scope="global")


def interleave_halves(vectors: list[Expr], lanes: int) -> list[Expr]:
    """One step of a transposition: rows i and i + lanes / 2 become the interleaved rows 2 i and 2 i + 1."""
    half = lanes // 2
    made = []
    for low, high in zip(vectors[:half], vectors[half:], strict=True):
        for first in (0, half):
            order = [lane for i in range(first, first + half) for lane in (i, lanes + i)]
            made.append(bind(tirx.Shuffle([low, high], order)))
    return made


def transpose(source: Matrix, target: Matrix, rows: int, columns: int, isa: Isa) -> None:
    """``target[j, i] = source[i, j]`` with columns of both side by side: square blocks of vectors, by shuffles."""
    lanes = narrowed(isa.lanes, rows, columns)

    def block(i: Expr, j: Expr) -> None:
        vectors = [bind(load(source.buffer, source.at(i + k, j), lanes)) for k in range(lanes)]
        width = lanes
        while width > 1:
            vectors = interleave_halves(vectors, lanes)
            width //= 2
        for k, vector in enumerate(vectors):
            store(target.buffer, target.at(j + k, i), vector)

    with loop(-(-rows // lanes)) as down, loop(-(-columns // lanes)) as right:
        block(
            bind(minimum(down * lanes, rows - lanes)),
            bind(minimum(right * lanes, columns - lanes)),
        )


def gather(source: Matrix, target: Matrix, rows: int, columns: int, isa: Isa) -> None:
    """``target[i, j] = source[i, j]``, target's columns side by side."""
    if source.row == 1:
        transpose(source.transposed(), target, columns, rows, isa)
        return
    with loop(rows) as i, loop(columns) as j:
        store(target.buffer, target.at(i, j), load(source.buffer, source.at(i, j), 1))


def tile_product(
    isa: Isa,
    a: Matrix,
    b: Matrix,
    tile: tuple[int, int],
    depth: int,
    columns: int,
    finish: Finish,
) -> None:
    """The products of ``tile[0]`` rows of a, which starts at the tile, with all columns of b."""
    pixels, vectors = tile
    lanes = narrowed(isa.lanes, columns)
    width = lanes * vectors
    full, rest = divmod(columns, width)

    def block(first: Expr, starts: list[int]) -> None:
        sums = Accumulators(pixels, len(starts), "float32", lanes)
        for p in range(pixels):
            for v in range(len(starts)):
                sums.set(p, v, constant("float32", 0.0, lanes))
        with loop(depth) as k:
            at = bind(b.at(k, first))
            loaded = [bind(load(b.buffer, at + start, lanes)) for start in starts]
            left = bind(a.at(0, k))
            for p in range(pixels):
                value = bind(broadcast(load(a.buffer, left + p * a.row, 1), lanes))
                for v, column in enumerate(loaded):
                    sums.set(p, v, multiply_add(isa, value, column, sums.get(p, v)))
        for p in range(pixels):
            for v, start in enumerate(starts):
                finish(p, first + start, sums.get(p, v), lanes)

    if full:
        with loop(full) as index:
            block(bind(index * width), [v * lanes for v in range(vectors)])
    if rest:
        starts = [full * width + offset for offset in range(0, rest, lanes)]
        starts[-1] = columns - lanes
        block(0, starts)


@dataclass(frozen=True)
class Tasks:
    """How the rows of all matrices are shared: ``shares`` of ``tiles`` tiles of ``pixels`` rows each a matrix."""

    pixels: int
    tiles: int
    shares: int

    @property
    def chunk(self) -> int:
        """Tiles of a share."""
        return -(-self.tiles // self.shares)


def share_rows(rows: int, pixels: int, lead: Sequence[int | None], threads: int) -> Tasks:
    """Whole matrices a thread where that comes out even, else shares of their rows."""
    tiles = -(-rows // pixels)
    matrices = 1
    for size in lead:
        matrices *= size or 1
    even = threads == 1 or matrices % threads == 0 or matrices >= _SHARES * threads
    wanted = 1 if even else min(tiles, _SHARES)
    return Tasks(pixels, tiles, -(-tiles // -(-tiles // wanted)))


@contextmanager
def for_tasks(
    tasks: Tasks, batch: Expr, lead: Sequence[int | None], threads: int
) -> Iterator[tuple[list[Expr], Expr, Expr]]:
    """Loop over matrices and shares: the leading index, the share's first tile and its end."""
    matrices: Expr = batch if lead else 1
    for size in lead[1:]:
        matrices = matrices * size
    with loop(matrices * tasks.shares, parallel=threads > 1) as task:
        index = bind(floor_div(task, tasks.shares))
        first = bind(floor_mod(task, tasks.shares) * tasks.chunk)
        last = bind(minimum(first + tasks.chunk, tasks.tiles))
        yield unravel(index, lead), first, last


def matmul(workload: Matmul, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(a, b, y)``; ``CompileError`` where y's columns do not lie side by side."""
    if workload.y.strides[-1] != 1:
        raise CompileError(
            f"matmul writes columns side by side, not {workload.y.strides[-1]} apart; copy y after it."
        )
    rows, depth, columns = workload.rows, workload.depth, workload.columns
    name = kernel_name("matmul", f"{rows}x{depth}x{columns}", workload, isa.name, threads)
    arguments = [activation_argument(n, getattr(workload, n).storage) for n in ("a", "b", "y")]
    vectors = -(-columns // isa.lanes)
    tile = choose_tile(isa, "float32", rows, 4 * workload.a.strides[-2], vectors, depth)
    tasks = share_rows(rows, tile[0], workload.lead, threads)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        size = workload.lead[0] if workload.lead else 1
        count = batch if size is None else size
        with for_tasks(tasks, count, workload.lead, threads) as (lead, first, last):
            views = (workload.a, workload.b, workload.y)
            a, b, y = (matrix(v, f, lead) for v, f in zip(views, flats, strict=True))
            if b.column != 1:
                packed = Matrix(scratch(depth * columns), 0, columns, 1)
                gather(b, packed, depth, columns, isa)
                b = packed
            with T.serial(first, last) as index:
                row = bind(minimum(index * tile[0], rows - tile[0]))
                target = bind(y.at(row, 0))

                def finish(p: int, column: Expr, total: Expr, lanes: int) -> None:
                    if workload.scale != 1.0:
                        total = total * constant("float32", workload.scale, lanes)
                    store(y.buffer, target + p * y.row + column, total)

                above = replace(a, start=bind(a.at(row, 0)))
                tile_product(isa, above, b, tile, depth, columns, finish)

    return build(name, arguments, body)
