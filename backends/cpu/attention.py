"""Scaled dot-product attention in one kernel: scores never leave the cache, and are normalised after the second product.

For each tile of query rows: scores against the transposed keys, mask, exponentials of the differences from the row's
largest, product with the values, division by the row's sum.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.conv_plan import choose_tile
from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    broadcast,
    constant,
    load,
    loop,
    minimum,
    pieces,
    select,
    store,
)
from graphopt.backends.cpu.fold import fold, lane_numbers, largest, plus
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.matmul import (
    Matrix,
    for_tasks,
    gather,
    matrix,
    scratch,
    share_rows,
    tile_product,
)
from graphopt.backends.cpu.softmax import exponential
from graphopt.backends.cpu.stream import activation_argument, build, kernel_name
from graphopt.backends.cpu.tokens import Attention
from graphopt.errors import CompileError

_PAGE_BYTES = 4096  # rows this far apart share one set of the L1 cache


def attention(workload: Attention, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(query, key, value, [mask], y)``; ``CompileError`` where y's columns do not lie side by side."""
    if workload.y.strides[-1] != 1:
        raise CompileError(
            f"attention writes columns side by side, not {workload.y.strides[-1]} apart; copy y after it."
        )
    if workload.mask is not None and workload.mask.strides[-1] not in (0, 1):
        raise CompileError(
            f"attention reads a mask's columns side by side, not {workload.mask.strides[-1]} apart; "
            "copy the mask before it."
        )
    names = ["query", "key", "value", *(["mask"] if workload.mask else []), "y"]
    arguments = [activation_argument(name, getattr(workload, name).storage) for name in names]
    legible = f"{workload.rows}x{workload.keys}x{workload.depth}"
    name = kernel_name("attention", legible, workload, isa.name, threads)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        _Kernel(workload, isa, threads, dict(zip(names, flats, strict=True))).emit(batch)

    return build(name, arguments, body)


class _Kernel:
    def __init__(
        self, workload: Attention, isa: Isa, threads: int, buffers: dict[str, Buffer]
    ) -> None:
        self.workload = workload
        self.isa = isa
        self.threads = threads
        self.buffers = buffers
        self.stride = -(-workload.keys // isa.lanes) * isa.lanes  # whole vectors of scores
        self.scores_tile = self._tile(self.stride, workload.depth)
        pixels = self.scores_tile[0]
        fitting = [t for t in isa.tiles("float32") if t[0] == pixels]
        vectors = -(-workload.columns // isa.lanes)
        self.values_tile = pixels, max(min(t[1], vectors) for t in fitting)

    def _tile(self, columns: int, depth: int) -> tuple[int, int]:
        """The cost model's tile of scores, or one of more rows that computes fewer of them twice: 8 for 6 of 128."""
        pitch, rows = 4 * self.workload.query.strides[-2], self.workload.rows
        width = columns // self.isa.lanes
        least, vectors = choose_tile(self.isa, "float32", rows, pitch, width, depth)
        most = least if pitch % _PAGE_BYTES == 0 else rows
        fitting = [p for p, v in self.isa.tiles("float32") if v == vectors and least <= p <= most]
        return min(fitting, key=lambda p: (-(-rows // p) * p, p)), vectors

    def _matrix(self, name: str, lead: list[Expr]) -> Matrix:
        return matrix(getattr(self.workload, name), self.buffers[name], lead)

    def emit(self, batch: Expr) -> None:
        workload = self.workload
        size = workload.lead[0] if workload.lead else 1
        pixels = self.scores_tile[0]
        tasks = share_rows(workload.rows, pixels, workload.lead, self.threads)
        count = batch if size is None else size
        with for_tasks(tasks, count, workload.lead, self.threads) as (lead, first, last):
            keys = self._keys(lead)
            values = self._values(lead)
            scores = Matrix(scratch(pixels * self.stride), 0, self.stride, 1)
            inverse = scratch(pixels)
            with T.serial(first, last) as index:
                row = bind(minimum(index * pixels, workload.rows - pixels))
                self._scores(lead, row, keys, scores)
                self._bases(lead, row, scores, inverse)
                self._exponentials(scores, inverse)
                self._outputs(lead, row, scores, values, inverse)

    def _keys(self, lead: list[Expr]) -> Matrix:
        """The keys transposed, to whole vectors: depth x stride."""
        workload, isa = self.workload, self.isa
        packed = Matrix(scratch(workload.depth * self.stride), 0, self.stride, 1)
        gather(self._matrix("key", lead).transposed(), packed, workload.depth, workload.keys, isa)
        with loop(workload.depth) as k:
            for first, lanes in pieces(self.stride - workload.keys):
                zero = constant("float32", 0.0, lanes)
                store(packed.buffer, packed.at(k, workload.keys + first), zero)
        return packed

    def _values(self, lead: list[Expr]) -> Matrix:
        values = self._matrix("value", lead)
        if values.column == 1:
            return values
        keys, columns = self.workload.keys, self.workload.columns
        packed = Matrix(scratch(keys * columns), 0, columns, 1)
        gather(values, packed, keys, columns, self.isa)
        return packed

    def _scores(self, lead: list[Expr], row: Expr, keys: Matrix, scores: Matrix) -> None:
        query = self._matrix("query", lead)
        query = replace(query, start=bind(query.at(row, 0)))

        def finish(p: int, column: Expr, total: Expr, lanes: int) -> None:
            store(scores.buffer, scores.at(p, column), total)

        depth = self.workload.depth
        tile_product(self.isa, query, keys, self.scores_tile, depth, self.stride, finish)

    def _bases(self, lead: list[Expr], row: Expr, scores: Matrix, bases: Buffer) -> None:
        """Scale and mask the scores; the largest of each row, 0 where all are masked.

        In a loop of its own: beside the exponentials a row waits for its largest score, 1.1 times as long a kernel.
        """
        with loop(self.scores_tile[0]) as p:
            line = bind(p * self.stride)
            self._mask(lead, row + p, scores, line)
            for first, lanes in pieces(self.stride - self.workload.keys):
                least = constant("float32", -math.inf, lanes)
                store(scores.buffer, line + self.workload.keys + first, least)
            most = fold(
                self.stride,
                self.isa.lanes,
                -math.inf,
                largest,
                lambda offset, lanes: load(scores.buffer, line + offset, lanes),
            )
            nothing = most == constant("float32", -math.inf)
            store(bases, p, select(nothing, constant("float32", 0.0), most))

    def _exponentials(self, scores: Matrix, bases: Buffer) -> None:
        """Each row of scores by its exponentials, its base by the inverse of their sum: 0 where all are masked."""
        with loop(self.scores_tile[0]) as p:
            line, base = bind(p * self.stride), bind(load(bases, p, 1))

            def emit_exponential(offset: Expr, lanes: int) -> Expr:
                score = load(scores.buffer, line + offset, lanes)
                power = bind(exponential(score - broadcast(base, lanes), lanes))
                store(scores.buffer, line + offset, power)
                return power

            zero = constant("float32", 0.0)
            total = fold(self.stride, self.isa.lanes, 0.0, plus, emit_exponential)
            store(bases, p, select(total == zero, zero, constant("float32", 1.0) / total))

    def _mask(self, lead: list[Expr], row: Expr, scores: Matrix, line: Expr) -> None:
        """Scale a row and add the mask; -inf above the diagonal of a causal one."""
        workload = self.workload
        row = bind(row)

        def emit(column: Expr, lanes: int) -> None:
            value = load(scores.buffer, line + column, lanes)
            value = value * constant("float32", workload.scale, lanes)
            if workload.mask is not None:
                value = value + self._mask_vector(lead, row, column, lanes)
            if workload.causal:
                later = lane_numbers(column, lanes) > broadcast(T.cast(row, "int32"), lanes)
                value = select(later, constant("float32", -math.inf, lanes), value)
            store(scores.buffer, line + column, value)

        whole, rest = divmod(workload.keys, self.isa.lanes)
        with loop(whole) as index:
            emit(bind(index * self.isa.lanes), self.isa.lanes)
        for first, lanes in pieces(rest):
            emit(whole * self.isa.lanes + first, lanes)

    def _mask_vector(self, lead: list[Expr], row: Expr, column: Expr, lanes: int) -> Expr:
        mask = self._matrix("mask", lead)
        start = bind(mask.at(row, column))
        if mask.column == 1:
            return load(mask.buffer, start, lanes)
        return broadcast(load(mask.buffer, start, 1), lanes)

    def _outputs(
        self, lead: list[Expr], row: Expr, scores: Matrix, values: Matrix, inverse: Buffer
    ) -> None:
        y = self._matrix("y", lead)
        target = bind(y.at(row, 0))

        def finish(p: int, column: Expr, total: Expr, lanes: int) -> None:
            scaled = total * broadcast(load(inverse, p, 1), lanes)
            store(y.buffer, target + p * y.row + column, scaled)

        keys, columns = self.workload.keys, self.workload.columns
        tile_product(self.isa, scores, values, self.values_tile, keys, columns, finish)
