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
    """A sum of the thread: row (output) and column (channel) within the block's tile, and its value.

    ``following`` is the sum of the next column, where the thread has that too; the column is even then.
    """

    row: Expr
    column: Expr
    total: Expr
    following: Expr | None = None

    @property
    def totals(self) -> list[Expr]:
        return [self.total] if self.following is None else [self.total, self.following]


def store_elements(target: Buffer, at: Expr, elements: Sequence[Expr]) -> None:
    """One or two neighbouring elements by one instruction."""
    if len(elements) == 1:
        T.buffer_store(target, elements[0], [at])
        return
    dtype = str(target.dtype)
    values = T.alloc_buffer((len(elements),), dtype, scope="local")
    for i, element in enumerate(elements):
        T.buffer_store(values, element, [i])
    T.add_to_parent(target.vstore(at, values.vload(0, vector(dtype, len(elements)))))


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
        self._known: dict[int, tuple[Expr, tuple[Expr, ...]]] = {}

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
            elements = []
            for i, total in enumerate(result.totals):
                other = None if early is None else self._staged_residual(staged, result, i)
                elements.append(T.cast(self._element(total, result.column, i, other), dtype))
            store_elements(staged, at, elements)
        synchronize()
        self._each_group(lambda at: self._store_group(staged, at))

    def _staged_residual(self, staged: Buffer, result: Result, i: int) -> Expr:
        """A residual from shared memory, where only those came that exist."""
        output = self.place.first_output + result.row
        channel = self._parameters(result.column, i)[0]
        there = tirx.all(output < self.place.outputs, channel < self.y.stored_channels)
        element = staged[result.row * self.pitch + result.column + i]
        return tirx.if_then_else(there, element, tirx.const(0, str(staged.dtype)))

    def _element(self, total: Expr, column: Expr, i: int, residual: Expr | None) -> Expr:
        """What is stored of the sum of column ``column + i``; that of bytes lacks its residual."""
        _, *parameters = self._parameters(column, i)
        epilogue = self.workload.epilogue
        value = bind(total + parameters[0])
        if self.plan.product.is_integer:
            if epilogue.requantize is not None:
                return requantize(epilogue.requantize, value, parameters[1])
            return finish(epilogue, value, parameters[1], int32(0))
        if residual is not None:
            value = bind(value + T.cast(residual, "float32"))
        return apply_activation(epilogue.activation, value)

    def _parameters(self, column: Expr, i: int) -> tuple[Expr, ...]:
        """Channel, bias and multiplier of column ``column + i``, once for all its results."""
        known = self._known.get(i)
        if known is None or known[0] is not column:
            channel = bind(self.place.first_channel + column + i)
            constants = self.flats[2 : 4 if self.plan.product.is_integer else 3]
            known = column, (channel, *(bind(constant[channel]) for constant in constants))
            self._known[i] = known
        return known[1]

    def _store_floats(self, results: Sequence[Result]) -> None:
        y = self.y
        pairs = access(*(view.layout for view in (y, self.residual) if view is not None)) > 1
        for result in results:
            output = bind(self.place.first_output + result.row)
            count = len(result.totals)
            channels = [self._parameters(result.column, i)[0] for i in range(count)]
            steps = [range(count)] if pairs else [range(i, i + 1) for i in range(count)]
            for step in steps:
                exists = channels[step[0]] < y.layout.channels
                with T.If(tirx.all(output < self.place.outputs, exists)), T.Then():
                    elements = [self._float(result, output, i) for i in step]
                    store_elements(y.flat, y.at(output, channels[step[0]]), elements)

    def _float(self, result: Result, output: Expr, i: int) -> Expr:
        """The float32 element of a sum, with its residual."""
        residual, channel = self.residual, self._parameters(result.column, i)[0]
        other = None if residual is None else residual.flat[residual.at(output, channel)]
        return self._element(result.totals[i], result.column, i, other)

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
