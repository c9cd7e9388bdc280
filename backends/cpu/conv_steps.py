"""The steps of a convolution's window: activations of every pixel of a tile times packed weights of its channel vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.conv_plan import ConvPlan
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.matrix import pair_of_loaded, pair_of_steps
from graphopt.backends.cpu.workload import Conv2d


@contextmanager
def optional_loop(extent: int) -> Iterator[Expr]:
    """A loop, or its single iteration 0."""
    if extent == 1:
        yield 0
        return
    with T.serial(0, extent) as i:
        yield i


@dataclass(frozen=True)
class Steps:
    """Adds to the ``accumulators`` of one tile."""

    workload: Conv2d
    isa: Isa
    plan: ConvPlan
    x: Buffer
    weight: Buffer
    accumulators: emit.Accumulators

    @property
    def integer(self) -> bool:
        return self.workload.x.dtype == "uint8"

    def one(
        self,
        vectors: int,
        weights: Expr,
        x_index: Expr,
        valid: int | None = None,
    ) -> None:
        """One broadcast of every pixel times one packed weight of every channel vector."""
        weights, x_index = bind(weights), bind(x_index)
        valid = valid or self.plan.step

        def spread(p: int) -> list[Expr]:
            if self.isa.form == "matrix":
                starts = [x_index + pixel * self._pitch for pixel in self._pixels(p)]
                return [pair_of_steps(self.x, starts, valid)]
            index = x_index + p * self._pitch
            if not self.integer:
                return [bind(emit.broadcast(emit.load(self.x, index, 1), self.plan.lanes))]
            word = bind(emit.load_channels(self.x, index, valid))
            return emit.spread_channels(self.isa, word)

        self._products(vectors, weights, spread)

    def whole(
        self,
        vectors: int,
        weights: Expr,
        x_index: Expr,
        steps: int,
    ) -> None:
        """A span's whole steps on a row whose multiply-adds read lanes: one load of a pixel serves several of them.

        The weights are not fetched ahead: they run on from block to block, which the hardware sees.
        """
        plan, isa = self.plan, self.isa
        depth, count = vectors * plan.step_elements, isa.steps_a_load
        groups, rest = divmod(steps, count)
        if groups:
            with optional_loop(groups) as k:
                first = bind(x_index + k * (count * plan.step))
                column = bind(weights + k * (count * depth))
                pixels = [
                    emit.load_steps(isa, self.x, first + p * self._pitch)
                    for p in range(plan.pixels)
                ]
                for step in range(count):
                    spread = partial(self._lane, pixels, step)
                    self._products(vectors, column + step * depth, spread)
        if rest:
            with optional_loop(rest) as k:
                k = groups * count + k
                self.one(vectors, weights + k * depth, x_index + k * plan.step)

    def _lane(self, loaded: list[Expr], step: int, p: int) -> list[Expr]:
        if self.isa.form == "matrix":
            return [pair_of_loaded([loaded[pixel] for pixel in self._pixels(p)], step)]
        return emit.spread_step(self.isa, loaded[p], step)

    def _pixels(self, row: int) -> range:
        """The pixels of a row of registers of sums."""
        size = self.isa.sum_pixels
        return range(row * size, min(row * size + size, self.plan.pixels))

    @property
    def _pitch(self) -> int:
        """Elements of x from a pixel of a tile to the next."""
        return self.workload.stride[1] * self.workload.x.channel_stride

    def _products(
        self,
        vectors: int,
        weights: Expr,
        spread: Callable[[int], list[Expr]],
    ) -> None:
        """Add ``spread(row)``, the left operands of a step, times its weights to all sums of the tile."""
        plan, isa, size = self.plan, self.isa, self.isa.sum_pixels
        elements = plan.step_elements // size
        offsets = [weights + v * elements for v in range(vectors * size)]
        if not self.integer:
            columns = [bind(emit.load(self.weight, o, plan.lanes)) for o in offsets]
            for p in range(plan.pixels):
                (value,) = spread(p)
                for v, column in enumerate(columns):
                    total = emit.multiply_add(isa, value, column, self.accumulators.get(p, v))
                    self.accumulators.set(p, v, total)
            return
        halves = [emit.load_weights(isa, self.weight, o) for o in offsets]
        for p in range(-(-plan.pixels // size)):
            operands = spread(p)
            for v, half in enumerate(halves):
                self.accumulators.set(
                    p, v, emit.dot(isa, self.accumulators.get(p, v), operands, half)
                )
