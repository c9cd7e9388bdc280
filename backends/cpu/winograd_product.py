"""The matrix products in the middle of Winograd's algorithm: ``tiles x vectors`` sums over all input channels at one point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.winograd_plan import WinogradPlan
from graphopt.backends.cpu.winograd_transform import POINTS

_LINE_BYTES = 64


@dataclass(frozen=True)
class Product:
    """Reads transformed ``inputs`` and weights, writes ``products``."""

    plan: WinogradPlan
    isa: Isa
    weight: Buffer
    inputs: Buffer
    products: Buffer

    @property
    def dtype(self) -> str:
        """Of inputs, weights (pairs of int16 as int32) and sums."""
        return str(self.weight.dtype)

    def emit(
        self,
        shape: tuple[int, int],
        source: Expr,
        weights: Expr,
        target: Expr,
        ahead: Expr,
        calls: int,
    ) -> None:
        """One of ``calls`` register tiles of a point.

        On the way it fetches its share of the next point's weights, which come from L3: the hardware alone reached 12 GB/s.
        """
        plan, lanes = self.plan, self.plan.lanes
        tiles, vectors = shape
        sums = emit.Accumulators(tiles, vectors, self.dtype, lanes)
        for t in range(tiles):
            for v in range(vectors):
                sums.set(t, v, emit.constant(self.dtype, 0, lanes))

        def step(k: Expr, value: Callable[[int], list[Expr]]) -> None:
            row = bind(weights + k * (vectors * lanes))
            columns = [bind(emit.load(self.weight, row + v * lanes, lanes)) for v in range(vectors)]
            if plan.streams:
                line = _LINE_BYTES // 4
                size = -(-vectors * lanes // calls)
                for offset in range(0, size, line):
                    emit.prefetch(self.weight, ahead + k * size + offset)
            for t in range(tiles):
                x = [bind(part) for part in value(t)]
                for v, column in enumerate(columns):
                    sums.set(t, v, self._multiply_add(sums.get(t, v), x, column))

        self._steps(tiles, source, step)
        for t in range(tiles):
            for v in range(vectors):
                offset = target + (t * POINTS * vectors + v) * lanes
                emit.store(self.products, offset, sums.get(t, v))

    def _steps(
        self, tiles: int, source: Expr, step: Callable[[Expr, Callable[[int], list[Expr]]], None]
    ) -> None:
        """``step(k, x)`` for every input channel or pair of them; on a row that reads lanes, a load for several."""
        plan, lanes, count = self.plan, self.plan.lanes, self.isa.steps_a_load
        groups = plan.steps // count if self.isa.by_element else 0
        if groups:
            with emit.loop(groups) as group:
                first = bind(group * count)
                loaded = [
                    bind(emit.load(self.inputs, source + first + t * plan.steps, count))
                    for t in range(tiles)
                ]
                for i in range(count):
                    step(first + i, self._lanes(loaded, i))
        rest = plan.steps - groups * count
        if not rest:
            return
        with emit.loop(rest) as k:
            at = bind(k + groups * count) if groups else k
            step(
                at,
                lambda t: [
                    emit.broadcast(emit.load(self.inputs, source + at + t * plan.steps, 1), lanes)
                ],
            )

    def _lanes(self, loaded: list[Expr], step: int) -> Callable[[int], list[Expr]]:
        """One step's inputs of a tile, of what was loaded for several."""
        if self.dtype == "int32":
            return lambda t: emit.spread_pairs(self.isa, loaded[t], step)
        return lambda t: [tirx.Shuffle([loaded[t]], [step] * self.plan.lanes)]

    def _multiply_add(self, total: Expr, x: list[Expr], weight: Expr) -> Expr:
        if len(x) == 2:
            pairs = T.reinterpret(emit.vector("int16", 2 * self.plan.lanes), weight)
            return emit.multiply_halves(self.isa, total, x, pairs)
        if self.dtype == "int32":
            return emit.dot_pairs(self.isa, total, x[0], weight)
        return emit.multiply_add(self.isa, x[0], weight, total)
