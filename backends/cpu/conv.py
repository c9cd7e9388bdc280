"""Dense and grouped convolution and linear: ``y = epilogue(sum x * w + bias)`` from one register-tiled micro-kernel.

A tile of ``pixels x vectors`` accumulators stays in registers over the whole window; each step broadcasts 4 uint8 (or 1
float32) of every pixel and multiplies them by the packed weights of every channel vector. The last tile of a line overlaps
its neighbour instead of having code of its own.
Loops: chunks of tiles, groups and channel blocks, tiles of the chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.cpu.conv_plan import (
    ConvChoice,
    ConvPlan,
    chunk_tiles,
    overlaps,
    plan_conv2d,
)
from graphopt.backends.cpu.conv_steps import Steps, optional_loop
from graphopt.backends.cpu.conv_store import Beside, Place, Scratch, TileStore
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.matrix import Blocks
from graphopt.backends.cpu.surroundings import fill_surroundings
from graphopt.backends.cpu.workload import Conv2d, Layout

_LINE_BYTES = 64
_RESIDENT_BYTES = 64 * 1024  # smaller weights are quick to fetch
_PREFETCHED_TILES = 200  # more tiles than this hide one slow tile; fewer than 2 stream, which the hardware prefetches

_Place = tuple[Expr, Expr, Expr]  # image, row, column

__all__ = ["conv2d", "function_name", "pack_conv2d"]


def function_name(
    workload: Conv2d, isa: Isa, threads: int, choice: ConvChoice | None = None
) -> str:
    """``conv2d_u8s8_3x3s2_56x56x64_128_<hash>``: legible, unique, blind to what does not shape the code."""
    x, y = workload.x, workload.y
    kinds = "u8s8" if x.dtype == "uint8" else "f32"
    stride = "" if workload.stride == (1, 1) else f"s{workload.stride[0]}"
    groups = "" if workload.groups == 1 else f"_g{workload.groups}"
    shaping = dataclasses.replace(workload, x_zero_point=0, x=dataclasses.replace(x, fill=0))
    chosen = "" if choice is None else f" {choice!r}"
    digest = hashlib.sha256(f"{shaping!r} {isa.name} {threads}{chosen}".encode()).hexdigest()[:8]
    kernel = f"{workload.kernel[0]}x{workload.kernel[1]}"
    shape = f"{x.height}x{x.width}x{x.channels}"
    return f"conv2d_{kinds}_{kernel}{stride}_{shape}_{y.channels}{groups}_{digest}"


def _shape(layout: Layout, batch: Expr) -> tuple[Expr, ...]:
    return (batch, *layout.shape)


def _pixel(layout: Layout, image: Expr, row: Expr, column: Expr) -> Expr:
    """Offset of the first channel of a pixel; row and column count from the physical corner."""
    pixel = (image * layout.rows + row) * layout.columns + column
    return pixel * layout.channel_stride + layout.first_channel


class _Waiting:
    """A tile's accumulators in a ``Scratch``, finished in ``groups`` groups of pixels, ``steps`` at the most."""

    def __init__(self, store: TileStore, plan: ConvPlan, channels: int, steps: int) -> None:
        self._store = store
        self._vectors = -(-channels // plan.lanes)
        self._pixels = plan.pixels
        self.scratch = Scratch(plan.pixels, self._vectors, plan.lanes)
        self._together = store.together(plan.pixels, channels, steps)
        self.groups = -(-plan.pixels // self._together)

    def keep(self, accumulators: emit.Accumulators) -> None:
        """Take the sums of a tile."""
        for v in range(self._vectors):
            for p in range(self._pixels):
                self.scratch.set(p, v, accumulators.vector(p, v))

    def finish(self, group: Expr, place: Place) -> None:
        """One group; the last one overlaps its neighbour, and its pixels are stored twice."""
        start = bind(emit.minimum(group * self._together, self._pixels - self._together))
        self._store.finish(self.scratch.get, start, self._together, place)

    def finish_all(self, place: Place) -> None:
        """All groups in a loop."""
        with emit.loop(self.groups) as group:
            self.finish(group, place)


class _Kernel:
    """One kernel under construction: its buffers, its plan and the emitters of the loop nest from the outside in."""

    def __init__(self, workload: Conv2d, isa: Isa, threads: int, choice: ConvChoice | None) -> None:
        self.workload = workload
        self.threads = threads
        self.name = function_name(workload, isa, threads, choice)
        self.plan = plan_conv2d(workload, isa, choice)
        self.isa = self.plan.isa
        self.integer = workload.x.dtype == "uint8"
        self.accumulator_dtype = "int32" if self.integer else "float32"

    def build(self) -> tvm.tirx.PrimFunc:
        with emit.kernel(self.name) as builder:
            self._arguments()
            fill_surroundings(self.y, self.workload.y, self.batch)
            self._either_tile()
        return builder.get()

    def _arguments(self) -> None:
        workload, plan = self.workload, self.plan
        batch: Expr = workload.x.batch
        if batch is None:
            batch = tirx.Var("n", "int64")
        self.batch = batch

        def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
            return T.arg(name, T.buffer(shape, dtype))

        weight_dtype = "int8" if self.integer else "float32"
        x = argument("x", _shape(workload.x, batch), workload.x.dtype)
        weight = argument("weight", (plan.packed_weights,), weight_dtype)
        self.bias = argument("bias", (plan.packed_channels,), self.accumulator_dtype)
        self.multiplier = None
        if self.integer:
            self.multiplier = argument("multiplier", (plan.packed_channels,), "float32")
        residual = None
        if workload.residual is not None:
            shape = _shape(workload.residual, batch)
            residual = argument("residual", shape, workload.residual.dtype)
        y = argument("y", _shape(workload.y, batch), workload.y.dtype)
        self.x, self.weight, self.y = emit.flat(x), weight, emit.flat(y)
        self.residual = None if residual is None else emit.flat(residual)
        self.store = TileStore(workload, self.isa, self.y, self.multiplier, self.residual)

    def _either_tile(self) -> None:
        """The planned tile, or one pixel a tile where a dynamic batch turns out to hold fewer pixels than that."""
        pixels = self.batch * (self.workload.y.height * self.workload.y.width)
        if not self.plan.may_not_fit:
            self._tasks()
            return
        with T.If(pixels >= self.plan.pixels):
            with T.Then():
                self._tasks()
            with T.Else():
                self.plan = dataclasses.replace(self.plan, pixels=1)
                self._tasks()

    def _tasks(self) -> None:
        """Chunks of tiles x groups x channel blocks: the loop that threads share."""
        plan = self.plan
        units, chunk, chunks = self._chunks()
        blocks = plan.groups * plan.blocks
        with emit.loop(chunks * blocks, parallel=self.threads > 1) as task:
            first = bind(emit.floor_div(task, blocks) * chunk)
            last = bind(emit.minimum(first + chunk, units))
            group_block = emit.floor_mod(task, blocks)
            group = bind(emit.floor_div(group_block, plan.blocks))
            block = bind(emit.floor_mod(group_block, plan.blocks))
            full = plan.vectors * plan.lanes
            if not plan.tail_channels:
                self._block(group, block, full, first, last)
            elif not plan.full_blocks:
                self._block(group, block, plan.tail_channels, first, last)
            else:
                with T.If(block < plan.full_blocks):
                    with T.Then():
                        self._block(group, block, full, first, last)
                    with T.Else():
                        self._block(group, plan.full_blocks, plan.tail_channels, first, last)

    def _tiles_in_row(self) -> int:
        return -(-self.workload.y.width // self.plan.pixels)

    def _chunks(self) -> tuple[Expr, int, Expr]:
        """Tiles of the whole tensor, tiles of a chunk, chunks. Decides how many tiles share a prefetch, too."""
        workload, plan = self.workload, self.plan
        y = workload.y
        if plan.flat_pixels:
            pixels = self.batch * (y.height * y.width)
            units = emit.floor_div(pixels + (plan.pixels - 1), plan.pixels)
            image = -(-y.height * y.width // plan.pixels)
        else:
            image = y.height * self._tiles_in_row()
            units = self.batch * image
        known = units if isinstance(units, int) else None
        chunk = chunk_tiles(workload, plan, self.isa, known, image, self.threads)
        streams = plan.packed_weights * (1 if self.integer else 4) > _RESIDENT_BYTES
        share = chunk if known else min(chunk, image)
        self.prefetch_tiles = share if streams and 1 < share <= _PREFETCHED_TILES else 0
        return units, chunk, emit.floor_div(units + (chunk - 1), chunk)

    def _block(self, group: Expr, block: Expr, channels: int, first: Expr, last: Expr) -> None:
        """The tiles ``first .. last`` of one channel block of ``channels`` output channels."""
        plan = self.plan
        vector = bind(group * plan.group_vectors + block * plan.vectors)
        weights = bind(vector * (plan.all_steps * plan.step_elements))
        packed_channel = bind(vector * plan.lanes)
        x_channel = bind(group * plan.in_channels)
        y_channel = bind(group * plan.out_channels + block * (plan.vectors * plan.lanes))
        vectors = -(-channels // plan.lanes)

        def accumulate(unit: Expr, beside: Beside | None) -> emit.Accumulators:
            place = self._place(unit)
            accumulators = self._accumulators(vectors)
            for v in range(vectors):
                start = bind(emit.load(self.bias, packed_channel + v * plan.lanes, plan.lanes))
                accumulators.begin(v, start)
            self._prefetch_residual(channels, y_channel, place)
            ahead = self._prefetch_start(unit - first, weights, vectors)
            x_start = self._x_start(place) + x_channel
            self._window(accumulators, vectors, weights, x_start, ahead, beside)
            return accumulators

        def target(unit: Expr) -> Place:
            place, residual = self._place(unit), self.workload.residual
            y_start = bind(self._corner(self.workload.y, place) + y_channel)
            r_start: Expr = 0
            if residual is not None:
                r_start = bind(self._corner(residual, place) + y_channel)
            return Place(y_start, r_start, packed_channel, channels)

        if self._overlaps():
            self._overlap(accumulate, target, channels, first, last)
            return
        if self.store.waits:
            self._defer(accumulate, target, channels, first, last)
            return
        with T.serial(first, last) as unit:
            accumulators = accumulate(unit, None)
            self.store.finish(accumulators.vector, 0, plan.pixels, target(unit))

    def _accumulators(self, vectors: int) -> emit.Accumulators:
        plan = self.plan
        if plan.isa.form == "matrix":
            return Blocks(plan.pixels, vectors)
        return emit.Accumulators(plan.pixels, vectors, self.accumulator_dtype, plan.lanes)

    def _overlaps(self) -> bool:
        """True where a tile's epilogue runs beside the next tile's steps."""
        plan, requantizes = self.plan, self.workload.epilogue.requantize is not None
        possible = (requantizes or self.store.waits) and plan.span >= plan.step
        return possible and overlaps(self.isa, self.workload.x.dtype, plan.pixels, plan.vectors)

    def _overlap(
        self,
        accumulate: Callable[[Expr, Beside | None], emit.Accumulators],
        target: Callable[[Expr], Place],
        channels: int,
        first: Expr,
        last: Expr,
    ) -> None:
        """The tiles ``first .. last``, each one's epilogue beside the first steps of the next."""
        plan = self.plan
        steps = plan.taps_high * plan.taps_wide * (plan.span // plan.step)
        waiting = _Waiting(self.store, plan, channels, steps)
        waiting.keep(accumulate(first, None))
        with T.serial(first + 1, last) as unit:
            place = target(unit - 1)
            beside = Beside(waiting.groups, lambda group: waiting.finish(group, place))
            waiting.keep(accumulate(unit, beside))
        waiting.finish_all(target(last - 1))
        waiting.scratch.release()

    def _defer(
        self,
        accumulate: Callable[[Expr, Beside | None], emit.Accumulators],
        target: Callable[[Expr], Place],
        channels: int,
        first: Expr,
        last: Expr,
    ) -> None:
        """The tiles ``first .. last``, each one's epilogue as a loop after its steps."""
        waiting = _Waiting(self.store, self.plan, channels, self.plan.pixels)
        with T.serial(first, last) as unit:
            waiting.keep(accumulate(unit, None))
            waiting.finish_all(target(unit))
        waiting.scratch.release()

    def _place(self, unit: Expr) -> _Place:
        """Image, row and column of a tile's first pixel; a last tile that would not fit starts earlier."""
        y, plan = self.workload.y, self.plan
        if plan.flat_pixels:
            pixels = self.batch * (y.height * y.width)
            return 0, 0, bind(emit.minimum(unit * plan.pixels, pixels - plan.pixels))
        tiles = self._tiles_in_row()
        line = bind(emit.floor_div(unit, tiles))
        column = bind(
            emit.minimum(emit.floor_mod(unit, tiles) * plan.pixels, y.width - plan.pixels)
        )
        return bind(emit.floor_div(line, y.height)), bind(emit.floor_mod(line, y.height)), column

    def _x_start(self, place: _Place) -> Expr:
        image, row, column = place
        workload = self.workload
        (sh, sw), (top, left) = workload.stride, workload.padding
        x_row = row * sh + (workload.x.top - top)
        x_column = column * sw + (workload.x.left - left)
        return _pixel(workload.x, image, x_row, x_column)

    @staticmethod
    def _corner(layout: Layout, place: _Place) -> Expr:
        """Offset of the tile's first pixel in a tensor of the output's shape."""
        image, row, column = place
        return _pixel(layout, image, row + layout.top, column + layout.left)

    def _prefetch_residual(self, channels: int, y_channel: Expr, place: _Place) -> None:
        """Ask for the residual's lines before the window starts: they come from far, in short pieces."""
        residual = self.workload.residual
        if residual is None or self.residual is None:
            return
        start = bind(self._corner(residual, place) + y_channel)
        line = _LINE_BYTES if residual.dtype == "uint8" else _LINE_BYTES // 4
        for p in range(self.plan.pixels):
            for channel in range(0, channels, line):
                index = start + (p * residual.channel_stride + channel)
                emit.prefetch(self.residual, index, near=True)

    def _prefetch_start(self, tile: Expr, weights: Expr, vectors: int) -> Expr | None:
        """Where this tile of a chunk begins to prefetch: its share of the next channel block's weights."""
        if not self.prefetch_tiles:
            return None
        block = vectors * self.plan.step_elements * self.plan.all_steps
        share = -(-block // self.prefetch_tiles)
        return bind(weights + block + emit.floor_mod(tile, self.prefetch_tiles) * share)

    def _window(
        self,
        accumulators: emit.Accumulators,
        vectors: int,
        weights: Expr,
        x_start: Expr,
        ahead: Expr | None,
        beside: Beside | None,
    ) -> None:
        """Multiply a tile's windows by one channel block: loops over window rows, spans and steps."""
        plan, x = self.plan, self.workload.x
        dh, dw = self.workload.dilation
        x_start = bind(x_start)
        whole, partial = divmod(plan.span, plan.step)
        depth = vectors * plan.step_elements
        steps = Steps(self.workload, self.isa, plan, self.x, self.weight, accumulators)
        with optional_loop(plan.taps_high) as r, optional_loop(plan.taps_wide) as s:
            x_span = bind(
                x_start + r * (dh * x.columns * x.channel_stride) + s * (dw * x.channel_stride)
            )
            span = r * plan.taps_wide + s
            w_span = bind(weights + span * (plan.steps * depth))
            if self.isa.by_element:
                steps.whole(vectors, w_span, x_span, whole)
            elif whole:
                with optional_loop(whole) as k:
                    if ahead is not None:
                        self._prefetch(ahead, span * plan.steps + k, depth)
                    if beside is not None:
                        beside.emit(span * whole + k, plan.taps_high * plan.taps_wide * whole)
                    steps.one(vectors, w_span + k * depth, x_span + k * plan.step)
            if partial:
                last = x_span + whole * plan.step
                steps.one(vectors, w_span + whole * depth, last, partial)

    def _prefetch(self, ahead: Expr, step: Expr, depth: int) -> None:
        """One step's part of the tile's share, a prefetch a line."""
        share = -(-depth // self.prefetch_tiles)
        line = _LINE_BYTES // (1 if self.integer else 4)
        for offset in range(0, share, line):
            emit.prefetch(self.weight, ahead + step * share + offset)


def conv2d(
    workload: Conv2d, isa: Isa, threads: int, choice: ConvChoice | None = None
) -> tvm.tirx.PrimFunc:
    """The kernel of a workload on an ISA row: a PrimFunc on ``x, weight, bias, [multiplier], [residual], y``.

    Weight, bias and multiplier are the arrays of ``pack_conv2d`` for the same ``choice`` (None: the cost model's). With
    ``threads`` above 1 the outermost loop is parallel.
    Raises ``CompileError`` on a workload whose layouts, margins and epilogue do not fit together.
    """
    return _Kernel(workload, isa, threads, choice).build()
