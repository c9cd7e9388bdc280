"""From sums in registers to the output: bias, requantization or activation, residual, in the definition's order.

Nothing is assumed of which sums a thread has. Elements of one and two bytes pass through shared memory, so that whole words
go out: bytes are rounded in the registers of the product and get their residual on the way out; to a float sum the residual
is added before it is rounded, so that residuals come to shared memory first. float32 goes out as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cuda.conv_plan import STAGING_PAD, ConvPlan
from graphopt.backends.cuda.conv_windows import BlockPlace
from graphopt.backends.cuda.device import synchronize
from graphopt.backends.cuda.epilogue import (
    apply_activation,
    finish,
    int32,
    quantized_add,
    requantize,
)
from graphopt.backends.cuda.memory import View, access, split
from graphopt.backends.cuda.products import item_bytes
from graphopt.backends.cuda.stream import vector


@dataclass(frozen=True)
class Result:
    """A sum of the thread: row (output) and column (channel) within the block's tile, and its value."""

    row: Expr
    column: Expr
    total: Expr


@dataclass(frozen=True)
class _Group:
    """``width`` neighbouring channels of an output, and where they are staged."""

    output: Expr
    channel: Expr
    offset: Expr
    width: int

    def element(self, view: View) -> Expr:
        return view.at(self.output, self.channel)

    def move(self, target: Buffer, at: Expr, source: Buffer, start: Expr) -> None:
        """The group's elements by one load and one store."""
        value = source.vload(start, vector(str(source.dtype), self.width))
        T.add_to_parent(target.vstore(at, value))


class ConvStore:
    """The end of a block. ``flats`` are the kernel's arguments ``(x, weight, bias, [multiplier], [residual], y)``.

    ``shared`` are the block's bytes of shared memory, which nobody needs any more.
    """

    def __init__(
        self, plan: ConvPlan, place: BlockPlace, flats: Sequence[Buffer], shared: Buffer
    ) -> None:
        workload = plan.workload
        self.plan, self.place, self.workload, self.flats = plan, place, workload, flats
        self.y = View(workload.y, flats[-1])
        self.residual = None if workload.residual is None else View(workload.residual, flats[-2])
        self.shared = shared
        self.pitch = plan.tile.columns + STAGING_PAD // item_bytes(workload.y.dtype)
        self._channel: tuple[Expr, tuple[Expr, ...]] | None = None

    def emit(self, results: Sequence[Result]) -> None:
        """Store every sum; all threads of the block come here after a barrier. A column's results lie together."""
        if self.workload.y.dtype == "float32":
            self._store_floats(results)
            return
        dtype, size = self.workload.y.dtype, self.plan.tile.rows * self.pitch
        staged = T.decl_buffer((size,), dtype, data=self.shared.data, scope=self.shared.scope())
        early = self.residual if not self.plan.product.is_integer else None
        if early is not None:
            self._each_group(lambda at: at.move(staged, at.offset, early.flat, at.element(early)))
            synchronize()
        for result in results:
            at = bind(result.row * self.pitch + result.column)
            other = None if early is None else self._staged_residual(staged, result, at)
            T.buffer_store(staged, T.cast(self._element(result, other), dtype), [at])
        synchronize()
        self._each_group(lambda at: self._store_group(staged, at))

    def _staged_residual(self, staged: Buffer, result: Result, at: Expr) -> Expr:
        """A residual from shared memory, where only those came that exist."""
        output = self.place.first_output + result.row
        channel = self._parameters(result.column)[0]
        there = tirx.all(output < self.place.outputs, channel < self.y.stored_channels)
        return tirx.if_then_else(there, staged[at], tirx.const(0, str(staged.dtype)))

    def _element(self, result: Result, residual: Expr | None) -> Expr:
        """What is stored of a sum; that of bytes lacks its residual."""
        _, *parameters = self._parameters(result.column)
        total, epilogue = result.total, self.workload.epilogue
        value = bind(total + parameters[0])
        if self.plan.product.is_integer:
            if epilogue.requantize is not None:
                return requantize(epilogue.requantize, value, parameters[1])
            return finish(epilogue, value, parameters[1], int32(0))
        if residual is not None:
            value = bind(value + T.cast(residual, "float32"))
        return apply_activation(epilogue.activation, value)

    def _parameters(self, column: Expr) -> tuple[Expr, ...]:
        """Channel, bias and multiplier of a column, once for all its results."""
        if self._channel is None or self._channel[0] is not column:
            channel = bind(self.place.first_channel + column)
            constants = self.flats[2 : 4 if self.plan.product.is_integer else 3]
            values = (channel, *(bind(constant[channel]) for constant in constants))
            self._channel = column, values
        return self._channel[1]

    def _store_floats(self, results: Sequence[Result]) -> None:
        y, residual = self.y, self.residual
        for result in results:
            output = bind(self.place.first_output + result.row)
            channel = self._parameters(result.column)[0]
            inside = tirx.all(output < self.place.outputs, channel < y.layout.channels)
            with T.If(inside), T.Then():
                other = None if residual is None else residual.flat[residual.at(output, channel)]
                T.buffer_store(y.flat, self._element(result, other), [y.at(output, channel)])

    def _each_group(self, body: Callable[[_Group], None]) -> None:
        """The tile's outputs that exist, in groups of neighbouring channels that one instruction moves."""
        tile, y, place = self.plan.tile, self.y, self.place
        width = access(*(view.layout for view in (y, self.residual) if view is not None))
        per_row = tile.columns // width
        total = tile.rows * per_row
        for first in range(0, total, tile.threads):
            row, part = split(place.thread + first, per_row)
            output = bind(place.first_output + row)
            channel = bind(place.first_channel + part * width)
            inside = tirx.all(output < place.outputs, channel < y.stored_channels)
            if total - first < tile.threads:
                inside = tirx.all(inside, place.thread + first < total)
            with T.If(inside), T.Then():
                body(_Group(output, channel, bind(row * self.pitch + part * width), width))

    def _store_group(self, staged: Buffer, at: _Group) -> None:
        """A group of staged elements to memory, the residual of bytes added."""
        dtype = self.workload.y.dtype
        if self.residual is None or not self.plan.product.is_integer:
            at.move(self.y.flat, at.element(self.y), staged, at.offset)
            return
        add = self.workload.epilogue.residual_add
        assert add is not None
        values = T.alloc_buffer((at.width,), dtype, scope="local")
        others = T.alloc_buffer((at.width,), self.residual.layout.dtype, scope="local")
        at.move(values, 0, staged, at.offset)
        at.move(others, 0, self.residual.flat, at.element(self.residual))
        for i in range(at.width):
            q = quantized_add(add, T.cast(values[i], "int32"), T.cast(others[i], "int32"))
            T.buffer_store(values, T.cast(q, dtype), [i])
        at.move(self.y.flat, at.element(self.y), values, 0)
