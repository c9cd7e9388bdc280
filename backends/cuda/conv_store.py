"""From sums in registers to the output: bias, requantization, residual, in the definition's order.

Bytes are rounded in the registers of the product and pass through shared memory, so that whole words go out; a residual is
added on the way. Nothing is assumed of which sums a thread has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cuda.conv_plan import ConvPlan
from graphopt.backends.cuda.conv_windows import BlockPlace
from graphopt.backends.cuda.device import synchronize
from graphopt.backends.cuda.epilogue import finish, int32, quantized_add, requantize
from graphopt.backends.cuda.memory import View, access, split
from graphopt.backends.cuda.stream import vector

_PAD = 16  # bytes between rows of staged outputs, against bank conflicts


@dataclass(frozen=True)
class Result:
    """A sum of the thread: row (output) and column (channel) within the block's tile, and its value."""

    row: Expr
    column: Expr
    total: Expr


@dataclass(frozen=True)
class ConvStore:
    """The end of a block. ``flats`` are the kernel's arguments ``(x, weight, bias, multiplier, [residual], y)``."""

    plan: ConvPlan
    place: BlockPlace
    flats: Sequence[Buffer]
    shared: Buffer  # bytes, which nobody needs any more

    @property
    def y(self) -> View:
        return View(self.plan.workload.y, self.flats[-1])

    @property
    def residual(self) -> View | None:
        layout = self.plan.workload.residual
        return None if layout is None else View(layout, self.flats[-2])

    def emit(self, results: Sequence[Result]) -> None:
        """Store every sum; all threads of the block come here after a barrier."""
        if self.plan.workload.y.dtype == "float32":
            self._store_floats(results)
            return
        self._stage_bytes(results)
        synchronize()
        self._store_bytes()

    def _affine(self, result: Result) -> tuple[Expr, Expr, Expr]:
        """Channel, sum with its bias, and multiplier."""
        bias, multiplier = self.flats[2:4]
        channel = bind(self.place.first_channel + result.column)
        return channel, bind(result.total + bias[channel]), bind(multiplier[channel])

    def _store_floats(self, results: Sequence[Result]) -> None:
        epilogue, y = self.plan.workload.epilogue, self.y
        for result in results:
            output = bind(self.place.first_output + result.row)
            channel, value, multiplier = self._affine(result)
            element = finish(epilogue, value, multiplier, int32(0))
            inside = tirx.all(output < self.place.outputs, channel < y.layout.channels)
            with T.If(inside), T.Then():
                T.buffer_store(y.flat, element, [y.at(output, channel)])

    @property
    def _pitch(self) -> int:
        return self.plan.tile.columns + _PAD

    def _stage_bytes(self, results: Sequence[Result]) -> None:
        """Round the sums and put the bytes where the tiles were."""
        parameters = self.plan.workload.epilogue.requantize
        assert parameters is not None
        for result in results:
            _, value, multiplier = self._affine(result)
            q = requantize(parameters, value, multiplier)
            at = result.row * self._pitch + result.column
            T.buffer_store(self.shared, T.cast(q, "uint8"), [at])

    def _store_bytes(self) -> None:
        """Rows of staged bytes to memory, a residual added."""
        tile, y, residual, place = self.plan.tile, self.y, self.residual, self.place
        width = access(*(view.layout for view in (y, residual) if view is not None))
        per_row = tile.columns // width
        values = T.alloc_buffer((width,), "uint8", scope="local")
        total = tile.rows * per_row
        for first in range(0, total, tile.threads):
            row, part = split(place.thread + first, per_row)
            output = bind(place.first_output + row)
            channel = bind(place.first_channel + part * width)
            inside = tirx.all(output < place.outputs, channel < y.stored_channels)
            if total - first < tile.threads:
                inside = tirx.all(inside, place.thread + first < total)
            with T.If(inside), T.Then():
                _move(values, self.shared, bind(row * self._pitch + part * width), width)
                if residual is not None:
                    self._add_residual(values, residual, residual.at(output, channel), width)
                word = values.vload(0, vector("uint8", width))
                T.add_to_parent(y.flat.vstore(y.at(output, channel), word))

    def _add_residual(self, values: Buffer, residual: View, at: Expr, width: int) -> None:
        add = self.plan.workload.epilogue.residual_add
        assert add is not None
        others = T.alloc_buffer((width,), "uint8", scope="local")
        _move(others, residual.flat, at, width)
        for i in range(width):
            q = quantized_add(add, T.cast(values[i], "int32"), T.cast(others[i], "int32"))
            T.buffer_store(values, T.cast(q, "uint8"), [i])


def _move(values: Buffer, source: Buffer, offset: Expr, width: int) -> None:
    T.add_to_parent(values.vstore(0, source.vload(offset, vector("uint8", width))))
