"""A deep convolution of few outputs in parts: blocks share the steps of a tile, a second kernel adds their sums up.

49 pixels of 512 channels are 32 blocks of the smallest tile, each 72 steps long, on a chip of 132 multiprocessors. The sums of
part s of image n lie in ``sums[n, s, pixel, channel]``, channels in whole tiles; they are added in the order of the parts, so
that float results, too, are the same at every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cuda.conv_plan import ConvPlan
from graphopt.backends.cuda.conv_store import Result, store_elements
from graphopt.backends.cuda.conv_windows import BlockPlace
from graphopt.backends.cuda.epilogue import apply_activation, finish, int32, to_float
from graphopt.backends.cuda.memory import View, activation, build
from graphopt.backends.cuda.stream import (
    Place,
    each_group,
    group_of,
    load_group,
    store_group,
    vector,
)


def sums_argument(plan: ConvPlan) -> Argument:
    return Argument("sums", (plan.workload.y.batch, *plan.sums_shape), plan.product.sums)


def store_sums(
    plan: ConvPlan, place: BlockPlace, part: Expr, target: Buffer, results: Sequence[Result]
) -> None:
    """A block's sums to memory, as part ``part`` of its outputs."""
    rows: dict[int, tuple[Expr, Expr]] = {}
    for result in results:
        if id(result.row) not in rows:
            output = bind(place.first_output + result.row)
            image, pixel = tirx.floordiv(output, plan.pixels), tirx.floormod(output, plan.pixels)
            line = bind((image * plan.splits + part) * plan.pixels + pixel)
            rows[id(result.row)] = bind(output < place.outputs), line
        there, line = rows[id(result.row)]
        channel = place.first_channel + result.column
        with T.If(there), T.Then():
            store_elements(target, line * plan.padded_channels + channel, result.totals)


def finish_sums(plan: ConvPlan) -> PrimFunc:
    """The kernel ``(sums, bias, multiplier, [residual], y)`` of integers, ``(sums, bias, [residual], y)`` of floats."""
    workload, product = plan.workload, plan.product
    y, residual = workload.y, workload.residual
    plain = replace(workload, x=replace(workload.x, fill=0), y=replace(y, fill=0))
    key = (plain, plan.tile, plan.splits, product)
    name = kernel_name("cuda_sums", f"{plan.splits}x{y.height}x{y.width}x{y.channels}", key)
    channels = plan.padded_channels
    arguments = [
        sums_argument(plan),
        Argument("bias", (channels,), product.sums),
        *([Argument("multiplier", (channels,), "float32")] if product.is_integer else []),
        *([] if residual is None else [activation("residual", residual)]),
        activation("y", y),
    ]
    return build(name, arguments, lambda batch, flats: _Finish(plan, flats).emit(batch))


class _Finish:
    """A thread a group of neighbouring channels of an output."""

    def __init__(self, plan: ConvPlan, flats: Sequence[Buffer]) -> None:
        workload = plan.workload
        self.plan, self.flats = plan, flats
        self.y = View(workload.y, flats[-1])
        self.residual = None if workload.residual is None else View(workload.residual, flats[-2])
        layouts = [view.layout for view in (self.y, self.residual) if view is not None]
        self.group = group_of(*layouts)

    def emit(self, batch: Expr) -> None:
        each_group(batch, self.y, self.group, self._store)

    def _store(self, at: Place) -> None:
        totals = self._totals(at)
        others: Sequence[Expr | None] = [None] * self.group
        if self.residual is not None:
            others = load_group(self.residual, at.pixel, at.channel, self.group)
        elements = [
            self._element(at.channel + i, total, other)
            for i, (total, other) in enumerate(zip(totals, others, strict=True))
        ]
        store_group(self.y, at.pixel, at.channel, elements)

    def _totals(self, at: Place) -> list[Expr]:
        """The sums of all parts."""
        plan, sums = self.plan, self.flats[0]
        pixel = tirx.floormod(at.pixel, plan.pixels)
        line = bind(at.image * (plan.splits * plan.pixels) + pixel)
        kind = vector(plan.product.sums, self.group)
        values = T.alloc_buffer((self.group,), plan.product.sums, scope="local")
        totals: list[Expr] = []
        for part in range(plan.splits):
            place = (line + part * plan.pixels) * plan.padded_channels + at.channel
            T.add_to_parent(values.vstore(0, sums.vload(place, kind)))
            found = [values[i] for i in range(self.group)]
            totals = [
                bind(value if part == 0 else total + value)
                for total, value in zip(totals or found, found, strict=True)
            ]
        return totals

    def _element(self, channel: Expr, total: Expr, residual: Expr | None) -> Expr:
        epilogue, bias = self.plan.workload.epilogue, self.flats[1]
        value = bind(total + bias[channel])
        if self.plan.product.is_integer:
            other = int32(0) if residual is None else residual
            return finish(epilogue, value, self.flats[2][channel], other)
        if residual is not None:
            value = bind(value + to_float(residual))
        return apply_activation(epilogue.activation, value)
