"""Max and average pooling over NHWC windows: a thread a pixel and group of channels, taps outside the map left out."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr, bind, select
from graphopt.backends.cpu.stream import Argument, kernel_name
from graphopt.backends.cpu.workload import Pool2d
from graphopt.backends.cuda.device import multiply_float
from graphopt.backends.cuda.epilogue import FLOATS, int32, round_and_clamp, to_float
from graphopt.backends.cuda.memory import View, activation, build
from graphopt.backends.cuda.stream import (
    Place,
    accumulators,
    each_group,
    group_of,
    load_group,
    store_group,
)

_LOWEST = {"uint8": 0, "int8": -128, **dict.fromkeys(FLOATS, float("-inf"))}


def pool(workload: Pool2d) -> PrimFunc:
    """The kernel ``(x, y)``, or ``(x, multipliers, y)`` of an integer average; see ``cpu.pool.pack_pool2d``.

    Floats of either type are added in float32.
    """
    x, y = workload.x, workload.y
    table = workload.kind == "average" and x.dtype not in FLOATS
    arguments = [activation("x", x), activation("y", y)]
    if table:
        taps = workload.kernel[0] * workload.kernel[1]
        arguments.insert(1, Argument("multipliers", (taps + 1,), "float32"))
    key = replace(workload, x=replace(x, fill=0), y=replace(y, fill=0))

    def body(batch: Expr, flats: list[Buffer]) -> None:
        result = View(y, flats[-1])
        group = group_of(x, y)
        window = _Window(workload, View(x, flats[0]), flats[1] if table else None, group)
        each_group(
            batch,
            result,
            group,
            lambda at: store_group(result, at.pixel, at.channel, window.reduce(at)),
            read=(x,),
        )

    legible = f"{workload.kind}_{y.height}x{y.width}x{y.channels}"
    return build(kernel_name("cuda_pool", legible, key), arguments, body)


class _Window:
    def __init__(self, workload: Pool2d, x: View, table: Buffer | None, group: int) -> None:
        self.workload, self.x, self.table, self.group = workload, x, table, group

    def reduce(self, at: Place) -> list[Expr]:
        w, x = self.workload, self.x.layout
        top = bind(at.row * w.stride[0] - w.padding[0])
        left = bind(at.column * w.stride[1] - w.padding[1])
        dtype = "float32" if x.dtype in FLOATS else "int32"
        initial = _LOWEST[x.dtype] if w.kind == "max" else 0
        totals = accumulators(self.group, dtype, initial)
        with T.serial(0, w.kernel[0]) as i, T.serial(0, w.kernel[1]) as j:
            row, column = bind(top + i * w.dilation[0]), bind(left + j * w.dilation[1])
            inside = tirx.all(row >= 0, row < x.height, column >= 0, column < x.width)
            with T.If(inside), T.Then():
                pixel = bind((at.image * x.height + row) * x.width + column)
                values = load_group(self.x, pixel, at.channel, self.group)
                for k, value in enumerate(values):
                    T.buffer_store(totals, self._combine(totals[k], T.cast(value, dtype)), [k])
        sums = [totals[k] for k in range(self.group)]
        return sums if w.kind == "max" else self._average(sums, top, left)

    def _combine(self, total: Expr, value: Expr) -> Expr:
        if self.workload.kind == "average":
            return total + value
        if self.x.layout.dtype not in FLOATS:
            return tirx.max(total, value)
        # torch's maximum of a window with a NaN is NaN, and a comparison with one is false
        larger = tirx.any(value > total, value != value)
        return select(larger, value, total)

    def _average(self, sums: list[Expr], top: Expr, left: Expr) -> list[Expr]:
        w = self.workload
        covered = self._count(top, left, False)
        counted = self._count(top, left, w.count_include_pad)
        if self.table is None:
            divisor = int32(w.divisor_override) if w.divisor_override else counted
            return [total / to_float(divisor) for total in sums]
        factor = bind(self.table[counted])
        found = []
        for total in sums:
            centred = total - covered * int32(w.x_zero_point)
            scaled = multiply_float(to_float(centred), factor)
            found.append(scaled if w.requantize is None else round_and_clamp(w.requantize, scaled))
        return found

    def _count(self, top: Expr, left: Expr, padded: bool) -> Expr:
        """Elements of the window in the map, or in the padded map."""
        w, counts = self.workload, []
        for axis, (start, size) in enumerate(((top, w.x.height), (left, w.x.width))):
            end = tirx.min(start + w.kernel[axis], size + w.padding[axis])
            if not padded:
                end, start = tirx.min(end, size), tirx.max(start, 0)
            counts.append(end - start)
        return bind(counts[0] * counts[1])
