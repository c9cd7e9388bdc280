"""The end of a sparse tile: epilogue and stores, a plane of 4 channels of bytes at a time, or 1 of floats."""

from __future__ import annotations

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
        self._start: Expr = 0
        self._waiting: list[list[Expr]] = []
        self._residuals: list[Expr] = []

    def begin(self, tile: Tile, plane: Expr) -> None:
        """The channels of a tile's plane follow."""
        y = self.plan.workload.y
        self._start = bind((tile.image * y.planes + plane) * y.plane_pixels + tile.pixel)
        self._waiting = []
        self._residuals = self._load_residuals()

    def _offset(self, index: int) -> int:
        """Pixels from the tile's first to those of its vector ``index``."""
        plan = self.plan
        i, j = divmod(index, plan.wide)
        return i * plan.lines * plan.width + j * plan.lanes

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
        for index, words in enumerate(zip(*self._waiting, strict=True)):
            q = interleaved(self.isa, bind(pack_bytes(self.isa, self.epilogue, *words)))
            self._store(index, bind(T.reinterpret(f"int32x{self.isa.lanes}", q)))

    def _load_residuals(self) -> list[Expr]:
        """The residual's pixels as stored, a vector for each of the tile."""
        if self.residual is None:
            return []
        group, lanes = self.plan.workload.y.group, self.isa.lanes
        starts = [(self._start + self._offset(i)) * group for i in range(self.plan.vectors)]
        values = [bind(emit.load(self.residual, start, lanes * group)) for start in starts]
        return [self._expand(value) for value in values]

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
        for index, total in enumerate(sums):
            other = self._residuals[index] if self._residuals else None
            value = apply_epilogue(self.epilogue, total, self.isa.lanes, multiplier, other)
            self._store(index, bind(value))

    def _store(self, index: int, words: Expr) -> None:
        """A vector's pixels. Lanes behind a line's end may be written where the tile's next vector overwrites them."""
        plan, lanes = self.plan, self.isa.lanes
        target = self._start + self._offset(index)
        valid = self._valid(index)
        if plan.lines > 1 and not plan.flat:
            words = self._compact(words)
        following = self._valid(index + 1) if index + 1 < plan.vectors else 0
        if lanes - valid <= following:
            valid = lanes
        for first, size in emit.pieces(valid):
            self._write(target + first, emit.slice_lanes(words, first, size, lanes), size)

    def _valid(self, index: int) -> int:
        """Pixels of the tile's vector that are in the map."""
        plan = self.plan
        if plan.flat or plan.tiles_wide > 1:
            return plan.lanes
        i, j = divmod(index, plan.wide)
        if plan.lines == 1:
            return min(plan.lanes, plan.width - j * plan.lanes)
        # fewer lines than it holds, perhaps, at the end of a map of a single tile
        return max(0, min(plan.lines, plan.height - i * plan.lines)) * plan.width

    def _compact(self, words: Expr) -> Expr:
        """Lines side by side, without what lies between them."""
        plan, lanes = self.plan, self.isa.lanes
        order = [line * plan.pitch + q for line in range(plan.lines) for q in range(plan.width)]
        order += [lanes - 1] * (lanes - len(order))
        return bind(tirx.Shuffle([words], order))

    def _expand(self, value: Expr) -> Expr:
        """Lines that lie side by side, where the tile's are."""
        plan, lanes, group = self.plan, self.isa.lanes, self.plan.workload.y.group
        if plan.flat or plan.lines == 1:
            return value
        places = [divmod(lane, plan.pitch) for lane in range(lanes)]
        order = [line * plan.width + min(q, plan.width - 1) for line, q in places]
        if group == 1:
            return bind(tirx.Shuffle([value], order))
        words = tirx.Shuffle([bind(T.reinterpret(f"int32x{lanes}", value))], order)
        return bind(T.reinterpret(f"uint8x{lanes * group}", words))

    def _write(self, pixel: Expr, words: Expr, lanes: int) -> None:
        group = self.plan.workload.y.group
        if group > 1:
            words = T.reinterpret(emit.vector("uint8", lanes * group), words)
        emit.store(self.y, pixel * group, words)
