"""3 x 3 convolution by Winograd's F(4, 3): ``y = A^T [sum_i (G w_i G^T) * (B^T x_i B)] A``, 36 products for 16 outputs of 144.

Where 4 does not divide the map, its last rows and columns are smaller tiles, F(1, 3) to F(3, 3), on the same weights.

Integers stay exact: bytes become int16 pairs, weights int16, sums are taken modulo 2**32 and scaled back (see
``winograd_transform``), so that a tile costs half the time of the direct form and has its bits. Floats lose about
two decimal digits of their 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.activation import LONG, apply_activation
from graphopt.backends.cpu.conv_store import Place, TileStore
from graphopt.backends.cpu.emit import Buffer, Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.surroundings import fill_surroundings
from graphopt.backends.cpu.winograd_plan import Points, function_name, plan_winograd
from graphopt.backends.cpu.winograd_product import Product
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

_EDGE = WINDOW - TILE  # inputs a side beyond the outputs


def _pixel(pixels: list[Expr], pixel: Expr, _vector: int) -> Expr:
    return pixels[pixel]


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tile of ``rows x columns`` outputs: its image, its first output row and column."""

    image: Expr
    row: Expr
    column: Expr
    rows: int
    columns: int


class _Kernel:
    """One kernel under construction."""

    def __init__(self, workload: Conv2d, isa: Isa, threads: int) -> None:
        self.workload = workload
        self.isa = isa
        self.threads = threads
        self.plan = plan_winograd(workload, isa, threads)
        self.integer = workload.x.dtype == "uint8"
        self.sum_dtype = "int32" if self.integer else "float32"
        activation = workload.epilogue.activation
        self.epilogue, self.late = workload.epilogue, None
        if activation is not None and activation.name in LONG:
            self.epilogue, self.late = (
                dataclasses.replace(self.epilogue, activation=None),
                activation,
            )

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
        """Images x chunks of tiles x shares of the output channels: the loop that threads share."""
        plan = self.plan
        with emit.loop(self.batch * (plan.chunks * plan.splits), self.threads > 1) as task:
            chunk = bind(emit.floor_div(task, plan.splits))
            image = bind(emit.floor_div(chunk, plan.chunks))
            first: Expr = 0
            if plan.chunks > 1:
                start = emit.floor_mod(chunk, plan.chunks) * plan.chunk
                first = bind(emit.minimum(start, plan.image - plan.chunk))
            # The buffers of a task: too large for registers or stack, TVM takes them from the thread's workspace.
            inputs = T.alloc_buffer((POINTS * plan.point_inputs,), self.sum_dtype, scope="global")
            products = T.alloc_buffer(
                (plan.chunk * POINTS * plan.vectors * plan.lanes,), self.sum_dtype, scope="global"
            )
            for tile, place in self._each_tile(image, first):
                self._transform_tile(inputs, tile, place)
            share = bind(emit.floor_mod(task, plan.splits))
            low = emit.floor_div(share * plan.full_blocks, plan.splits)
            high = emit.floor_div((share + 1) * plan.full_blocks, plan.splits)
            work = partial(self._block, inputs, products, image, first)
            if plan.full_blocks:
                with T.serial(low, high) as block:
                    work(block, plan.block_channels)
            if plan.tail_channels and plan.splits == 1:
                work(plan.full_blocks, plan.tail_channels)
            elif plan.tail_channels:
                with T.If(share == plan.splits - 1), T.Then():
                    work(plan.full_blocks, plan.tail_channels)

    def _in_chunk(self, first: Expr, low: int, high: int) -> tuple[Expr, Expr]:
        """The part of an image's tiles ``low .. high`` that lies in the chunk from ``first`` on, counted from there."""
        chunk = self.plan.chunk
        if (low, high) == (0, self.plan.image):
            return 0, chunk
        if self.plan.chunks == 1:
            return low, high
        start = bind(emit.minimum(tirx.max(low - first, 0), chunk))
        return start, bind(tirx.max(emit.minimum(high - first, chunk), start))

    def _each_tile(self, image: Expr, first: Expr) -> Iterator[tuple[Expr, _Place]]:
        """Inside a loop each: the tiles of a chunk of the same size, counted from its first, and their places."""
        for tiles in self.plan.cut:
            with T.serial(*self._in_chunk(first, tiles.first, tiles.end)) as tile:
                inside = bind(first + tile - tiles.first)
                row = bind(emit.floor_div(inside, tiles.wide) * TILE + tiles.top)
                column = bind(emit.floor_mod(inside, tiles.wide) * TILE + tiles.left)
                yield tile, _Place(image, row, column, tiles.rows, tiles.columns)

    def _transform_tile(self, inputs: Buffer, tile: Expr, place: _Place) -> None:
        """``B^T d B`` of one tile, all channels: a value of each to the matrix of every point."""
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
                self._transform_channels(inputs, start, target, bind(vector * width), width, place)
        for first, size in emit.pieces(rest):
            self._transform_channels(inputs, start, target, whole * width + first, size, place)

    def _transform_channels(
        self,
        inputs: Buffer,
        start: Expr,
        target: Expr,
        channel: Expr,
        lanes: int,
        place: _Place,
    ) -> None:
        plan, x = self.plan, self.workload.x
        high, wide = place.rows + _EDGE, place.columns + _EDGE
        columns = []
        for s in range(wide):
            values = []
            for r in range(high):
                offset = (r * x.columns + s) * x.channel_stride
                value = emit.load(self.x, start + channel + offset, lanes)
                if self.integer:
                    value = T.cast(value, emit.vector("int16", lanes))
                values.append(bind(value))
            columns.append(transform_input(values))
        per_word = 2 if self.integer else 1
        words = lanes // per_word
        for r in range(high):
            for s, value in enumerate(transform_input([column[r] for column in columns])):
                if self.integer:
                    value = T.reinterpret(emit.vector("int32", words), value)
                point = (r * WINDOW + s) * plan.point_inputs
                offset = emit.floor_div(channel, per_word)
                emit.store(inputs, target + offset + point, value)

    def _block(
        self, inputs: Buffer, products: Buffer, image: Expr, first: Expr, block: Expr, channels: int
    ) -> None:
        """One block of output channels of a chunk: the 36 matrix products, then every tile's transform back."""
        plan = self.plan
        vectors = -(-channels // plan.lanes)
        vector = bind(block * plan.vectors)
        weights = bind(vector * (POINTS * plan.steps * plan.lanes))
        for rows, parts in plan.point_rows:
            with T.serial(*rows) as row:
                for points in parts:
                    with T.serial(points.column_start, points.column_stop) as column:
                        point = bind(row * WINDOW + column)
                        self._point(inputs, products, vectors, weights, point, points, first)
        for tile, place in self._each_tile(image, first):
            source = bind(tile * (POINTS * vectors * plan.lanes))
            self._finish(products, vectors, channels, bind(vector * plan.lanes), source, place)

    def _point(
        self,
        inputs: Buffer,
        products: Buffer,
        vectors: int,
        weights: Expr,
        point: Expr,
        points: Points,
        first: Expr,
    ) -> None:
        """The matrix product of one point, over the tiles of the chunk that have it."""
        plan = self.plan
        low, high = self._in_chunk(first, points.first, points.end)
        calls = emit.floor_div(high - low + (points.tiles - 1), points.tiles)
        most = -(-min(plan.chunk, points.end - points.first) // points.tiles)
        share = plan.steps // most
        point_weights = bind(weights + point * (plan.steps * vectors * plan.lanes))
        with emit.loop(calls) as group:
            # Less than a register tile is left at the end of a chunk: others' sums then are made, and never read.
            last = emit.minimum(low + group * points.tiles, high - points.tiles)
            tile = bind(last if isinstance(high, int) else tirx.max(last, 0))
            ahead = bind(point_weights + (plan.steps + group * share) * (vectors * plan.lanes))
            source = bind(point * plan.point_inputs + tile * plan.steps)
            target = bind((tile * POINTS + point) * (vectors * plan.lanes))
            product = Product(plan, self.isa, self.weight, inputs, products)
            product.emit((points.tiles, vectors), source, point_weights, target, ahead, most)

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
                sums = self._sums(products, bind(source + at), vectors, here, place)
                for row, pixels in enumerate(sums):
                    target = Place(
                        y_start + (at + row * self._pitch(workload.y)),
                        r_start + (at + row * self._pitch(workload.residual)),
                        here,
                        valid,
                    )
                    take = partial(_pixel, pixels)
                    self.store.finish(take, 0, place.columns, target)
        if self.late is not None:
            self._activate(self.late, channels, y_start, place)

    @staticmethod
    def _pitch(layout: Layout | None) -> int:
        """Elements from a row of pixels to the next."""
        return 0 if layout is None else layout.columns * layout.channel_stride

    def _sums(
        self, products: Buffer, source: Expr, vectors: int, channel: Expr, place: _Place
    ) -> list[list[Expr]]:
        """The rows of pixels of one vector of channels, bias included; integers ``OUTPUT_SCALE`` times too large."""
        lanes = self.plan.lanes
        bias = bind(emit.load(self.bias, channel, lanes))
        rows = []
        for r in range(place.rows + _EDGE):
            points = [r * WINDOW + s for s in range(place.columns + _EDGE)]
            values = [
                bind(emit.load(products, source + point * (vectors * lanes), lanes))
                for point in points
            ]
            if self.integer and r == BIAS_POINT:
                values[BIAS_POINT] = bind(values[BIAS_POINT] + scaled_bias(bias, lanes))
            rows.append(transform_output(values, self.integer))
        columns = [
            transform_output([row[j] for row in rows], self.integer) for j in range(place.columns)
        ]
        pixels = [[column[i] for column in columns] for i in range(place.rows)]
        if self.integer:
            return [[bind(descale(value, lanes)) for value in row] for row in pixels]
        return [[bind(value + bias) for value in row] for row in pixels]

    def _activate(
        self, activation: Activation, channels: int, y_start: Expr, place: _Place
    ) -> None:
        """A long activation, over the tile just stored: loops over its pixels in place of a copy for each."""
        y = self.workload.y
        with emit.loop(place.rows) as i, emit.loop(place.columns) as j:
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
