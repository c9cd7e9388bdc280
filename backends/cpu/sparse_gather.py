"""What a chunk of lines reads, tap column by tap column, with strides and padding undone; bytes as the row multiplies them."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.sparse_plan import SparsePlan
from graphopt.backends.cpu.stream import sweep


class Gather:
    """Fills a buffer of ``plan.gathered_pixels`` from the planes of one image, or of a flat tile's ``map_pixels`` of each plane."""

    def __init__(self, plan: SparsePlan, isa: Isa, x: Buffer, gathered: Buffer) -> None:
        self.plan = plan
        self.isa = isa
        self.x = x
        self.gathered = gathered
        self.group = plan.workload.x.group
        self.width = plan.workload.y.width
        self.dtype = plan.workload.x.dtype

    def tile(self, start: Expr) -> None:
        """The pixels of all planes of a flat tile, the first plane's at ``start``."""
        plan = self.plan
        size = plan.lanes * self.group
        with emit.loop(plan.workload.x.planes) as plane:
            source = bind(start + plane * plan.workload.x.plane_pixels)
            for v in range(plan.wide):
                value = emit.load(self.x, (source + v * plan.lanes) * self.group, size)
                self._store(plane * plan.map_pixels + v * plan.lanes, value)

    def _store(self, pixel: Expr, value: Expr) -> None:
        if self.group > 1:
            value = emit.flipped(self.isa, value)
        emit.store(self.gathered, pixel * self.group, value)

    def chunk(self, image: Expr, first_line: Expr) -> None:
        """The maps of the chunk that begins at an output line."""
        plan = self.plan
        x, stride = plan.workload.x, plan.workload.stride[0]
        top = plan.workload.padding[0]
        with emit.loop(x.planes) as plane:
            source = bind((image * x.planes + plane) * x.plane_pixels)
            if plan.in_line:
                with emit.loop(plan.gathered_lines) as line:
                    self._columns(
                        source, line * stride, 0, plane, bind(line * plan.workload.y.width)
                    )
                return
            for phase in plan.phases:
                for part in range(plan.lines):
                    with emit.loop(plan.gathered_rows) as row:
                        line = first_line + part * plan.chunk_rows + row
                        offset = bind(row * plan.row_pitch + part * plan.pitch)
                        start = bind(line * stride + (phase - top))
                        self._columns(source, start, phase, plane, offset)

    def _columns(self, source: Expr, row: Expr, phase: int, plane: Expr, offset: Expr) -> None:
        """An input row, or the padding's value, in the maps of all tap columns."""
        plan, x = self.plan, self.plan.workload.x
        with T.If(tirx.all(row >= 0, row < x.height)):
            with T.Then():
                start = bind(source + row * x.width)
                for column in range(plan.workload.kernel[1]):
                    self._line(start, self._target(column, phase, plane) + offset, column)
            with T.Else():
                for column in range(plan.workload.kernel[1]):
                    target = bind(self._target(column, phase, plane) + offset)
                    self._fill(target, self.width)

    def _target(self, column: int, phase: int, plane: Expr) -> Expr:
        return (plane + self.plan.map_of(column, phase)) * self.plan.map_pixels

    def _line(self, start: Expr, target: Expr, column: int) -> None:
        """Pixels ``q`` of a line for one tap column: input pixels ``q * stride + column * dilation - left``."""
        plan = self.plan
        workload = plan.workload
        stride, width = workload.stride[1], workload.x.width
        shift = column * workload.dilation[1] - workload.padding[1]
        first = max(0, -(shift // stride))  # the first q that is not left of the map
        last = min(self.width, (width - 1 - shift) // stride + 1)
        target = bind(target)
        if last <= first:
            self._fill(target, self.width)
            return
        self._fill(target, first)
        start = bind(start + (first * stride + shift))

        def copy(q: Expr, lanes: int) -> None:
            value = self._load(start + q * stride, lanes, stride)
            self._store(target + first + q, value)

        sweep(last - first, plan.lanes, copy)
        self._fill(target + last, self.width - last)

    def _load(self, start: Expr, lanes: int, stride: int) -> Expr:
        """``lanes`` pixels, ``stride`` apart."""
        group = self.group
        if stride == 1 or lanes == 1:
            return emit.load(self.x, start * group, lanes * group)
        if stride != 2:
            pixels = [emit.load(self.x, (start + i * stride) * group, group) for i in range(lanes)]
            return self._joined(pixels)
        # the second half begins one pixel early: nothing behind the last pixel is read
        low = emit.load(self.x, start * group, lanes * group)
        high = emit.load(self.x, (start + lanes - 1) * group, lanes * group)
        words = [bind(self._words(value, lanes)) for value in (low, high)]
        order = [*range(0, lanes, 2), *range(lanes + 1, 2 * lanes, 2)]
        even = tirx.Shuffle(words, order)
        return even if group == 1 else T.reinterpret(f"{self.dtype}x{lanes * group}", even)

    def _words(self, value: Expr, lanes: int) -> Expr:
        return value if self.group == 1 else T.reinterpret(emit.vector("int32", lanes), value)

    def _joined(self, pixels: list[Expr]) -> Expr:
        words = [bind(self._words(pixel, 1)) for pixel in pixels]
        value = tirx.Shuffle(words, list(range(len(words))))
        if self.group == 1:
            return value
        return T.reinterpret(f"{self.dtype}x{len(words) * self.group}", value)

    def _fill(self, target: Expr, pixels: int) -> None:
        """The padding's value."""
        value = self.plan.workload.x_zero_point if self.group > 1 else 0.0
        target = bind(target)

        def store(q: Expr, lanes: int) -> None:
            vector = emit.constant(self.dtype, value, lanes * self.group)
            self._store(target + q, vector)

        if pixels:
            sweep(pixels, self.plan.lanes, store)
