"""The end of a sparse tile: epilogue and stores, a plane of 4 channels of bytes at a time, or 1 of floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.epilogue import (
    apply_epilogue,
    before_pack,
    interleaved,
    pack_bytes,
    pack_words,
)
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.sparse_plan import SparsePlan


@dataclass(frozen=True)
class Tile:
    """A register tile: its image and first pixel in planes of the output's shape."""

    image: Expr
    pixel: Expr


class SparseStore:
    """Takes the sums of a plane's channels one by one."""

    def __init__(self, plan: SparsePlan, isa: Isa, y: Buffer, residual: Buffer | None) -> None:
        self.plan = plan
        self.isa = isa
        self.y, self.residual = y, residual
        self.epilogue = plan.workload.epilogue
        self.rounds = self.epilogue.requantize is not None
        self.group = plan.workload.y.group
        self._start: Expr = 0
        self._waiting: list[list[Expr]] = []
        self._residuals: list[Expr] = []

    def begin(self, tile: Tile, plane: Expr) -> None:
        """The channels of a tile's plane follow."""
        y = self.plan.workload.y
        self._start = bind((tile.image * y.planes + plane) * y.plane_pixels + tile.pixel)
        self._waiting = []
        self._residuals = []
        if self.residual is not None and self.rounds:
            self._residuals = [self._load_residual(index) for index in range(self.plan.vectors)]

    def _line(self, index: int, part: int) -> int:
        """The output line of the vector's part, from the tile's first."""
        return index // self.plan.wide + part * self.plan.chunk_rows

    def _offset(self, index: int, part: int = 0) -> int:
        """Pixels from the tile's first to those of its vector ``index``, or of the line that is a part of it."""
        plan = self.plan
        return self._line(index, part) * plan.width + index % plan.wide * plan.lanes

    def channel(self, channel: int, sums: list[Expr], multiplier: Expr | None) -> None:
        """One channel of the plane: stored, or kept until its plane is whole."""
        if not self.rounds:
            self._store_floats(sums, multiplier)
            return
        values = [
            bind(before_pack(self.isa, self.epilogue, v, multiplier, self._residual(i, channel)))
            for i, v in enumerate(sums)
        ]
        if channel % 2:
            before = self._waiting.pop()
            values = [
                bind(pack_words(self.isa, self.epilogue, a, b))
                for a, b in zip(before, values, strict=True)
            ]
        self._waiting.append(values)

    def finish(self) -> None:
        """The plane is whole."""
        if not self.rounds:
            return
        packed = list(zip(*self._waiting, strict=True))
        self._store(lambda index: self._bytes(packed[index]))

    def _bytes(self, words: tuple[Expr, Expr]) -> Expr:
        """A vector's bytes, pixel by pixel."""
        return bind(interleaved(self.isa, bind(pack_bytes(self.isa, self.epilogue, *words))))

    def _load_residual(self, index: int) -> Expr:
        """The lines of a vector side by side; behind the map's end its last line again."""
        plan, group = self.plan, self.group
        size = plan.lanes // plan.lines
        parts = []
        for part in range(plan.lines):
            line = self._line(index, part)
            behind = max(0, line - (plan.height - 1))
            pixel = self._start + self._offset(index, part) - behind * plan.width
            parts.append(bind(emit.load(self.residual, pixel * group, size * group)))
        if len(parts) == 1:
            return parts[0]
        if group == 1:
            return bind(tirx.Shuffle(parts, list(range(plan.lanes))))
        words = [bind(T.reinterpret(emit.vector("int32", size), value)) for value in parts]
        joined = tirx.Shuffle(words, list(range(plan.lanes)))
        return bind(T.reinterpret(f"uint8x{plan.lanes * group}", joined))

    def _residual(self, index: int, channel: int) -> Expr | None:
        """One channel's bytes as int32."""
        if not self._residuals:
            return None
        lanes = self.isa.lanes
        words = T.reinterpret(f"uint32x{lanes}", self._residuals[index])
        if channel:
            words = words >> emit.constant("uint32", 8 * channel, lanes)
        if channel < 3:
            words = words & emit.constant("uint32", 0xFF, lanes)
        return T.reinterpret(f"int32x{lanes}", words)

    def _store_floats(self, sums: list[Expr], multiplier: Expr | None) -> None:
        def value(index: int) -> Expr:
            other = None if self.residual is None else self._load_residual(index)
            return bind(
                apply_epilogue(self.epilogue, sums[index], self.isa.lanes, multiplier, other)
            )

        self._store(value)

    def _store(self, vector: Callable[[int], Expr]) -> None:
        """The pixels of a plane; ``vector`` makes those of a vector. Lanes behind a line's end may be written where the tile's
        next line overwrites them."""
        plan, lanes = self.plan, self.isa.lanes
        size = lanes // plan.lines
        lines = [
            (self._offset(index, part), index, part * size, valid)
            for index in range(plan.vectors)
            for part in range(plan.lines)
            if (valid := self._valid(index, part)) > 0
        ]
        lines.sort()
        followers: list[tuple[int, int, int, int] | None] = [*lines[1:], None]
        made: dict[int, Expr] = {}
        for (offset, index, lane, valid), follower in zip(lines, followers, strict=True):
            written = valid
            if follower is not None and follower[0] == offset + valid:
                written = size if size - valid <= follower[-1] else valid
            if index not in made:  # stored as soon as it is there: it leaves its register
                made[index] = vector(index)
            for first, count in emit.pieces(written):
                words = self._slice(made[index], lane + first, count)
                emit.store(self.y, (self._start + offset + first) * self.group, words)

    def _valid(self, index: int, part: int) -> int:
        """Pixels that are in the map, of a vector's line."""
        plan = self.plan
        if plan.in_line or plan.tiles_wide > 1:
            return plan.lanes
        if plan.lines == 1:
            return min(plan.lanes, plan.width - index % plan.wide * plan.lanes)
        # fewer lines than it holds, perhaps, in a map of a single tile
        return plan.width if self._line(index, part) < plan.height else 0

    def _slice(self, vector: Expr, first: int, count: int) -> Expr:
        """Pixels of a vector."""
        if self.group == 1:
            return emit.slice_lanes(vector, first, count, self.isa.lanes)
        words = bind(T.reinterpret(f"int32x{self.isa.lanes}", vector))
        words = emit.slice_lanes(words, first, count, self.isa.lanes)
        return T.reinterpret(emit.vector("uint8", count * self.group), words)
