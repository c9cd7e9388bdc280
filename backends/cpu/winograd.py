"""3 x 3 convolution by Winograd's F(4, 3): ``y = A^T [sum_i (G w_i G^T) * (B^T x_i B)] A``, 36 products for 16 outputs of 144.

Integers stay exact: bytes become int16 pairs, weights int16, sums are taken modulo 2**32 and scaled back (see
``winograd_transform``), so that a tile costs half the time of the direct form and has its bits. Floats lose about
two decimal digits of their 7.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.activation import LONG, apply_activation
from graphopt.backends.cpu.conv_store import Place, TileStore
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.surroundings import fill_surroundings
from graphopt.backends.cpu.winograd_plan import plan_winograd
from graphopt.backends.cpu.winograd_transform import (
    BIAS_POINT,
    OUTPUT_SCALE,
    POINTS,
    TILE,
    WINDOW,
    descale,
    scaled_bias,
    transform_input,
    transform_output,
)
from graphopt.backends.cpu.workload import Activation, Conv2d, Layout

_LINE_BYTES = 64


def function_name(workload: Conv2d, isa: Isa, threads: int) -> str:
    """``winograd_u8s8_56x56x64_64_<hash>``: legible, unique, blind to what does not shape the code."""
    x = workload.x
    kinds = "u8s8" if x.dtype == "uint8" else "f32"
    shaping = dataclasses.replace(workload, x_zero_point=0, x=dataclasses.replace(x, fill=0))
    digest = hashlib.sha256(f"{shaping!r} {isa.name} {threads}".encode()).hexdigest()[:8]
    return f"winograd_{kinds}_{x.height}x{x.width}x{x.channels}_{workload.y.channels}_{digest}"


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tile: image, first output row and column, and the first of each that no earlier tile writes."""

    image: Expr
    row: Expr
    column: Expr
    new_row: Expr
    new_column: Expr


class _Kernel:
    """One kernel under construction."""

    def __init__(self, workload: Conv2d, isa: Isa, threads: int) -> None:
        self.workload = workload
        self.isa = isa
        self.threads = threads
        self.plan = plan_winograd(workload, isa, threads)
        self.integer = workload.x.dtype == "uint8"
        self.sum_dtype = "int32" if self.integer else "float32"
        self.epilogue, self.late = workload.epilogue, None
        activation = workload.epilogue.activation
        if activation is not None and activation.name in LONG:
            self.late = activation
            self.epilogue = dataclasses.replace(workload.epilogue, activation=None)

    def build(self) -> tvm.tirx.PrimFunc:
        with emit.kernel(function_name(self.workload, self.isa, self.threads)) as builder:
            self._arguments()
            fill_surroundings(self.y, self.workload.y, self.batch)
            self._tasks()
        return builder.get()

    def _arguments(self) -> None:
        workload, plan = self.workload, self.plan
        batch: Expr = workload.x.batch
        self.batch = tirx.Var("n", "int64") if batch is None else batch

        def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
            return T.arg(name, T.buffer(shape, dtype))

        def activations(name: str, layout: Layout) -> Buffer:
            return argument(name, (self.batch, *layout.shape), layout.dtype)

        x = activations("x", workload.x)
        self.weight = argument("weight", (plan.packed_weights,), self.sum_dtype)
        self.bias = argument("bias", (plan.packed_channels,), self.sum_dtype)
        self.multiplier = None
        if self.integer:
            self.multiplier = argument("multiplier", (plan.packed_channels,), "float32")
        residual = None
        if workload.residual is not None:
            residual = activations("residual", workload.residual)
        y = activations("y", workload.y)
        self.x, self.y = emit.flat(x), emit.flat(y)
        self.store = TileStore(
            dataclasses.replace(workload, epilogue=self.epilogue),
            self.isa,
            self.y,
            self.multiplier,
            None if residual is None else emit.flat(residual),
            OUTPUT_SCALE if self.integer else 1,
        )

    def _tasks(self) -> None:
        """Chunks of tiles x shares of the output channels: the loop that threads share."""
        plan = self.plan
        every = self.batch * plan.image
        chunks = emit.floor_div(every + (plan.chunk - 1), plan.chunk)
        with emit.loop(chunks * plan.splits, parallel=self.threads > 1) as task:
            chunk = emit.floor_div(task, plan.splits)
            first = bind(emit.minimum(chunk * plan.chunk, every - plan.chunk))
            # The buffers of a task: too large for registers or stack, TVM takes them from the thread's workspace.
            inputs = T.alloc_buffer((POINTS * plan.point_inputs,), self.sum_dtype, scope="global")
            products = T.alloc_buffer(
                (plan.chunk * POINTS * plan.vectors * plan.lanes,), self.sum_dtype, scope="global"
            )
            with emit.loop(plan.chunk) as tile:
                self._transform_tile(inputs, tile, self._place(first + tile))
            share = bind(emit.floor_mod(task, plan.splits))
            low = emit.floor_div(share * plan.full_blocks, plan.splits)
            high = emit.floor_div((share + 1) * plan.full_blocks, plan.splits)
            if plan.full_blocks:
                with T.serial(low, high) as block:
                    self._block(inputs, products, block, plan.block_channels, first)
            if plan.tail_channels and plan.splits == 1:
                self._block(inputs, products, plan.full_blocks, plan.tail_channels, first)
            elif plan.tail_channels:
                with T.If(share == plan.splits - 1), T.Then():
                    self._block(inputs, products, plan.full_blocks, plan.tail_channels, first)

    def _place(self, tile: Expr) -> _Place:
        plan, y = self.plan, self.workload.y
        tile = bind(tile)
        image = bind(emit.floor_div(tile, plan.image))
        inside = bind(tile - image * plan.image)
        new_row = bind(emit.floor_div(inside, plan.tiles_wide) * TILE)
        new_column = bind(emit.floor_mod(inside, plan.tiles_wide) * TILE)
        row = bind(emit.minimum(new_row, y.height - TILE))
        column = bind(emit.minimum(new_column, y.width - TILE))
        return _Place(image, row, column, new_row, new_column)

    def _transform_tile(self, inputs: Buffer, tile: Expr, place: _Place) -> None:
        """``B^T d B`` of one tile, all channels: 36 values of each to the 36 matrices."""
        plan, x = self.plan, self.workload.x
        top, left = self.workload.padding
        row, column = place.row + (x.top - top), place.column + (x.left - left)
        line = (place.image * x.rows + row) * x.columns
        start = bind((line + column) * x.channel_stride + x.first_channel)
        target = bind(tile * plan.steps)
        width = 2 * plan.lanes if self.integer else plan.lanes
        whole, rest = divmod(plan.in_channels, width)
        if whole:
            with emit.loop(whole) as vector:
                self._transform_channels(inputs, start, target, bind(vector * width), width)
        for first, size in emit.pieces(rest):
            self._transform_channels(inputs, start, target, whole * width + first, size)

    def _transform_channels(
        self, inputs: Buffer, start: Expr, target: Expr, channel: Expr, lanes: int
    ) -> None:
        plan, x = self.plan, self.workload.x
        columns = []
        for s in range(WINDOW):
            values = []
            for r in range(WINDOW):
                offset = (r * x.columns + s) * x.channel_stride
                value = emit.load(self.x, start + channel + offset, lanes)
                if self.integer:
                    value = T.cast(value, emit.vector("int16", lanes))
                values.append(bind(value))
            columns.append(transform_input(values))
        per_word = 2 if self.integer else 1
        words = lanes // per_word
        for r in range(WINDOW):
            for s, value in enumerate(transform_input([column[r] for column in columns])):
                if self.integer:
                    value = T.reinterpret(emit.vector("int32", words), value)
                point = (r * WINDOW + s) * plan.point_inputs
                offset = emit.floor_div(channel, per_word)
                emit.store(inputs, target + offset + point, value)

    def _block(
        self, inputs: Buffer, products: Buffer, block: Expr, channels: int, first: Expr
    ) -> None:
        """One block of output channels of a chunk: the 36 matrix products, then every tile's transform back."""
        plan = self.plan
        vectors = -(-channels // plan.lanes)
        vector = bind(block * plan.vectors)
        weights = bind(vector * (POINTS * plan.steps * plan.lanes))
        share = plan.steps // plan.calls
        with emit.loop(POINTS) as point:
            point_weights = bind(weights + point * (plan.steps * vectors * plan.lanes))
            with emit.loop(plan.calls) as group:
                tile = bind(emit.minimum(group * plan.tiles, plan.chunk - plan.tiles))
                ahead = bind(point_weights + (plan.steps + group * share) * (vectors * plan.lanes))
                source = bind(point * plan.point_inputs + tile * plan.steps)
                target = bind((tile * POINTS + point) * (vectors * plan.lanes))
                self._product(inputs, products, vectors, source, point_weights, target, ahead)
        with emit.loop(plan.chunk) as tile:
            place = self._place(first + tile)
            source = bind(tile * (POINTS * vectors * plan.lanes))
            self._finish(products, vectors, channels, bind(vector * plan.lanes), source, place)

    def _product(
        self,
        inputs: Buffer,
        products: Buffer,
        vectors: int,
        source: Expr,
        weights: Expr,
        target: Expr,
        ahead: Expr,
    ) -> None:
        """``tiles x vectors`` sums over all input channels at one point.

        On the way it fetches its share of the next point's weights, which come from L3: the hardware alone reached 12 GB/s.
        """
        plan, lanes = self.plan, self.plan.lanes
        sums = emit.Accumulators(plan.tiles, vectors, self.sum_dtype, lanes)
        for t in range(plan.tiles):
            for v in range(vectors):
                sums.set(t, v, emit.constant(self.sum_dtype, 0, lanes))
        with emit.loop(plan.steps) as k:
            row = bind(weights + k * (vectors * lanes))
            columns = [bind(emit.load(self.weight, row + v * lanes, lanes)) for v in range(vectors)]
            if plan.streams:
                line = _LINE_BYTES // 4
                size = -(-vectors * lanes // plan.calls)
                for offset in range(0, size, line):
                    emit.prefetch(self.weight, ahead + k * size + offset)
            for t in range(plan.tiles):
                value = emit.load(inputs, source + k + t * plan.steps, 1)
                value = bind(emit.broadcast(value, lanes))
                for v, column in enumerate(columns):
                    sums.set(t, v, self._multiply_add(sums.get(t, v), value, column))
        for t in range(plan.tiles):
            for v in range(vectors):
                offset = target + (t * POINTS * vectors + v) * lanes
                emit.store(products, offset, sums.get(t, v))

    def _multiply_add(self, total: Expr, x: Expr, weight: Expr) -> Expr:
        if self.integer:
            return emit.dot_pairs(self.isa, total, x, weight)
        return emit.multiply_add(self.isa, x, weight, total)

    def _finish(
        self,
        products: Buffer,
        vectors: int,
        channels: int,
        channel: Expr,
        source: Expr,
        place: _Place,
    ) -> None:
        """``A^T m A`` of one tile, bias, epilogue and stores: a loop over whole vectors, then the partial one."""
        workload, lanes = self.workload, self.plan.lanes
        y_start = bind(self._corner(workload.y, place) + channel)
        r_start: Expr = 0
        if workload.residual is not None:
            r_start = bind(self._corner(workload.residual, place) + channel)
        whole, rest = divmod(channels, lanes)
        for first, count, valid in ((0, whole, lanes), (whole, 1, rest)):
            if not count or not valid:
                continue
            with emit.loop(count) as i:
                at = bind((first + i) * lanes)
                here = bind(channel + at)
                sums = self._sums(products, bind(source + at), vectors, here)
                for row in range(TILE):
                    target = Place(
                        y_start + (at + row * self._pitch(workload.y)),
                        r_start + (at + row * self._pitch(workload.residual)),
                        here,
                        valid,
                    )
                    self._store_row(sums[row], row, place, target)
        if self.late is not None:
            self._activate(self.late, channels, y_start, place)

    @staticmethod
    def _pitch(layout: Layout | None) -> int:
        """Elements from a row of pixels to the next."""
        return 0 if layout is None else layout.columns * layout.channel_stride

    def _store_row(self, sums: list[Expr], row: int, place: _Place, target: Place) -> None:
        """Epilogue and store of a tile's row: together, but for float pixels that an earlier tile may have written."""
        if self.integer:
            self.store.finish(lambda pixel, _: sums[pixel], 0, TILE, target)
            return
        for column in range(TILE):
            with self._unless_written(place, row, column):
                self.store.finish(lambda pixel, _: sums[pixel], column, 1, target)

    def _sums(
        self, products: Buffer, source: Expr, vectors: int, channel: Expr
    ) -> list[list[Expr]]:
        """The rows of 4 pixels of one vector of channels, bias included; integers ``OUTPUT_SCALE`` times too large."""
        lanes = self.plan.lanes
        bias = bind(emit.load(self.bias, channel, lanes))
        rows = []
        for r in range(WINDOW):
            offsets = [(r * WINDOW + s) * vectors * lanes for s in range(WINDOW)]
            values = [bind(emit.load(products, source + offset, lanes)) for offset in offsets]
            if self.integer and r == BIAS_POINT:
                values[BIAS_POINT] = bind(values[BIAS_POINT] + scaled_bias(bias, lanes))
            rows.append(transform_output(values, self.integer))
        columns = [transform_output([row[j] for row in rows], self.integer) for j in range(TILE)]
        pixels = [[columns[j][i] for j in range(TILE)] for i in range(TILE)]
        if self.integer:
            return [[bind(descale(value, lanes)) for value in row] for row in pixels]
        return [[bind(value + bias) for value in row] for row in pixels]

    @contextmanager
    def _unless_written(self, place: _Place, i: Expr, j: Expr) -> Iterator[None]:
        """Float pixels that an earlier tile writes too would differ in their last bits, and by the number of threads."""
        y = self.workload.y
        conditions = []
        if y.height % TILE:
            conditions.append(place.row + i >= place.new_row)
        if y.width % TILE:
            conditions.append(place.column + j >= place.new_column)
        if self.integer or not conditions:
            yield
            return
        with T.If(tirx.all(*conditions)), T.Then():
            yield

    def _activate(
        self, activation: Activation, channels: int, y_start: Expr, place: _Place
    ) -> None:
        """A long activation, over the tile just stored: loops over its pixels in place of a copy for each."""
        y = self.workload.y
        with emit.loop(TILE) as i, emit.loop(TILE) as j, self._unless_written(place, i, j):
            pixel = bind(y_start + (i * y.columns + j) * y.channel_stride)
            for start in range(0, channels, self.plan.lanes):
                for first, lanes in emit.pieces(min(self.plan.lanes, channels - start)):
                    index = bind(pixel + (start + first))
                    value = emit.load(self.y, index, lanes)
                    emit.store(self.y, index, apply_activation(activation, value, lanes))

    def _corner(self, layout: Layout, place: _Place) -> Expr:
        """Offset of the tile's first pixel in a tensor of the output's shape."""
        row, column = place.row + layout.top, place.column + layout.left
        line = (place.image * layout.rows + row) * layout.columns
        return (line + column) * layout.channel_stride + layout.first_channel


def winograd(workload: Conv2d, isa: Isa, threads: int) -> tvm.tirx.PrimFunc:
    """The kernel of a workload that ``fits``: a PrimFunc on ``x, weight, bias, [multiplier], [residual], y``.

    The weight is what the function of ``winograd_weights`` makes of the packed one, bias and multiplier are whole vectors.
    """
    return _Kernel(workload, isa, threads).build()
