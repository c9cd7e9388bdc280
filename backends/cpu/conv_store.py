"""The end of a convolution's tile: epilogue and store of its accumulators, and where they wait meanwhile.

A tile's epilogue keeps the pipes busy that its dot products leave idle, and the other way round. So that they overlap, the
accumulators of one tile wait in a ``Scratch`` while the next tile's steps run, a few pixels' epilogue beside each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.activation import LONG, apply_activation
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.epilogue import PACKED_VECTORS, apply_epilogue, packed_epilogue
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Activation, Conv2d

_LINE = 64  # bytes; a vector that crosses two lines is stored and loaded at half the speed

Get = Callable[[Expr, int], Expr]  # the accumulator of a pixel and a channel vector


class Scratch:
    """``rows`` x ``columns`` int32 vectors on the stack, each column aligned to a cache line, rows indexed at run time.

    TVM aligns stack buffers to 16 bytes, hence the masked pointer. TVM does not see what goes through it: ``release``
    after the last use, or the memory is given to another buffer.
    """

    def __init__(self, rows: int, columns: int, lanes: int) -> None:
        self._lanes = lanes
        size = rows * lanes
        self._buffers = [
            T.alloc_buffer((size + _LINE // 4,), "int32", scope="global") for _ in range(columns)
        ]
        self._columns = [self._aligned(buffer, size) for buffer in self._buffers]

    @staticmethod
    def _aligned(buffer: Buffer, size: int) -> Buffer:
        for end in (0, size + _LINE // 4 - 1):  # or the buffer is cut down to the one element below
            T.evaluate(T.address_of(buffer[end]))
        mask = tirx.const(-_LINE, "int64")
        start = T.address_of(buffer[_LINE // 4])
        pointer = T.Bind(T.call_llvm_pure_intrin("handle", "llvm.ptrmask", start, mask))
        return T.decl_buffer((size,), "int32", data=pointer)

    def get(self, row: Expr, column: int) -> Expr:
        """The vector at ``(row, column)``."""
        return emit.load(self._columns[column], row * self._lanes, self._lanes)

    def set(self, row: Expr, column: int, value: Expr) -> None:
        """Replace the vector at ``(row, column)``."""
        emit.store(self._columns[column], row * self._lanes, value)

    def release(self) -> None:
        """Nothing is read any more."""
        for buffer in self._buffers:
            T.evaluate(T.address_of(buffer[0]))


@dataclass(frozen=True)
class Beside:
    """``count`` pieces of other work, spread over the steps of a window."""

    count: int
    piece: Callable[[Expr], None]

    def emit(self, step: Expr, steps: int) -> None:
        """What of it is done in ``step`` of ``steps``: the processor looks ahead a few steps, no further."""
        stride = 1 << (
            (steps // self.count).bit_length() - 1
        )  # a power of two: a mask, not a division
        due = []
        if stride > 1:
            due.append(emit.floor_mod(step, stride) == 0)
        if stride * self.count < steps:
            due.append(step < stride * self.count)
        with T.If(tirx.all(*due)) if due else nullcontext(), T.Then() if due else nullcontext():
            self.piece(bind(emit.floor_div(step, stride)))


@dataclass(frozen=True)
class Place:
    """Where a tile of one channel block is written: offsets of its first element in y and in the residual."""

    y: Expr
    residual: Expr
    packed_channel: Expr
    channels: int


class TileStore:
    """Epilogue and stores of a kernel, on its flat buffers. Accumulators come ``scale`` times too large, a power of two."""

    def __init__(
        self,
        workload: Conv2d,
        isa: Isa,
        y: Buffer,
        multiplier: Buffer | None,
        residual: Buffer | None,
        scale: int = 1,
    ) -> None:
        self.workload = workload
        self.isa = isa
        self.scale = scale
        self.y, self.multiplier, self.residual = y, multiplier, residual
        epilogue = workload.epilogue
        is_long = epilogue.activation is not None and epilogue.activation.name in LONG
        # Sums in integers wait in a Scratch for a loop over a few pixels, floats in y.
        self.waits = is_long and workload.x.dtype == "uint8"
        self.late = epilogue.activation if is_long and not self.waits else None
        self.epilogue = epilogue
        if self.late is not None:
            self.epilogue = dataclasses.replace(epilogue, activation=None)
        # One pixel's activation at a time: four vectors' wait for each other, and the steps beside them for registers.
        self.packs = epilogue.requantize is not None and bool(isa.pack_words) and not self.waits

    def together(self, pixels: int, channels: int, steps: int) -> int:
        """Pixels whose epilogue goes beside one step of the next tile, so that ``steps`` are enough: whole packs."""
        least = -(-pixels // steps)
        whole = channels // self.isa.lanes
        if not self.packs or not whole:
            return least
        multiple = PACKED_VECTORS // math.gcd(PACKED_VECTORS, whole)
        return min(-(-least // multiple) * multiple, pixels)

    def finish(self, get: Get, first: Expr, pixels: int, place: Place) -> None:
        """Epilogue and store of ``pixels`` pixels from ``first``: packs of whole vectors, then what is left of them."""
        lanes = self.isa.lanes
        whole = place.channels // lanes
        vectors = [(p, v) for p in range(pixels) for v in range(whole)]
        packed = len(vectors) // PACKED_VECTORS * PACKED_VECTORS if self.packs else 0
        multipliers: list[Expr] = [None] * -(-place.channels // lanes)
        if self.multiplier is not None:
            for v in range(whole):
                start = place.packed_channel + v * lanes
                multipliers[v] = self._load_multiplier(start, lanes)
        for start in range(0, packed, PACKED_VECTORS):
            self._store_pack(
                get, first, vectors[start : start + PACKED_VECTORS], multipliers, place
            )
        for p, v in vectors[packed:]:
            self._store_piece(get, first + p, v, 0, lanes, multipliers[v], place)
        for channel, size in emit.pieces(place.channels - whole * lanes):
            multiplier = None
            if self.multiplier is not None:
                start = place.packed_channel + whole * lanes + channel
                multiplier = self._load_multiplier(start, size)
            for p in range(pixels):
                self._store_piece(get, first + p, whole, channel, size, multiplier, place)
        if self.late is not None:
            self._activate(self.late, first, pixels, place)

    def _load_multiplier(self, start: Expr, lanes: int) -> Expr:
        value = bind(emit.load(self.multiplier, start, lanes))
        if self.scale == 1:
            return value
        return bind(value * emit.constant("float32", 1 / self.scale, lanes))

    def _y_index(self, pixel: Expr, channel: int, place: Place) -> Expr:
        return place.y + (pixel * self.workload.y.channel_stride + channel)

    def _load_residual(self, pixel: Expr, channel: int, lanes: int, place: Place) -> Expr | None:
        layout = self.workload.residual
        if layout is None or self.residual is None:
            return None
        index = place.residual + (pixel * layout.channel_stride + channel)
        return emit.load(self.residual, index, lanes)

    def _store_pack(
        self,
        get: Get,
        first: Expr,
        vectors: list[tuple[int, int]],
        multipliers: list[Expr],
        place: Place,
    ) -> None:
        """``PACKED_VECTORS`` vectors of neighbouring pixels become one; a store for the channels of each pixel."""
        lanes = self.isa.lanes
        value = packed_epilogue(
            self.isa,
            self.epilogue,
            [bind(get(first + p, v)) for p, v in vectors],
            [multipliers[v] for _, v in vectors],
            [self._load_residual(first + p, v * lanes, lanes, place) for p, v in vectors],
        )
        value = bind(value)
        for pixel in dict.fromkeys(p for p, _ in vectors):
            run = [i for i, (p, _) in enumerate(vectors) if p == pixel]
            for start, size in emit.pieces(len(run)):
                i = run[start]
                piece = emit.slice_lanes(value, i * lanes, size * lanes, PACKED_VECTORS * lanes)
                emit.store(
                    self.y, self._y_index(first + pixel, vectors[i][1] * lanes, place), piece
                )

    def _store_piece(
        self,
        get: Get,
        pixel: Expr,
        vector: int,
        start: int,
        lanes: int,
        multiplier: Expr | None,
        place: Place,
    ) -> None:
        """``lanes`` channels of one pixel, from ``start`` of a vector."""
        channel = vector * self.isa.lanes + start
        total = bind(emit.slice_lanes(get(pixel, vector), start, lanes, self.isa.lanes))
        other = self._load_residual(pixel, channel, lanes, place)
        dtype = self.workload.y.dtype
        value = apply_epilogue(self.epilogue, total, lanes, multiplier, other, dtype, self.isa)
        emit.store(self.y, self._y_index(pixel, channel, place), value)

    def _activate(self, activation: Activation, first: Expr, pixels: int, place: Place) -> None:
        """A long activation, over what was just stored: a loop over its pixels in place of a copy for each."""
        with emit.loop(pixels) as p:
            for start in range(0, place.channels, self.isa.lanes):
                for channel, lanes in emit.pieces(min(self.isa.lanes, place.channels - start)):
                    index = bind(self._y_index(first + p, start + channel, place))
                    value = emit.load(self.y, index, lanes)
                    emit.store(self.y, index, apply_activation(activation, value, lanes, self.isa))
