"""The rows of a convolution's matrix of windows, in shared memory: row m is the window of output m, k its taps' channels.

The matrix is never written down: each thread works out once which windows the rows stand for that it copies, and at each
step where the taps of its bytes lie. Where a window leaves the map, or a row is past the last output, the tile holds the
zero point, which the bias takes back.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind
from graphopt.backends.cuda.conv_plan import ConvPlan
from graphopt.backends.cuda.device import Device
from graphopt.backends.cuda.epilogue import int32
from graphopt.backends.cuda.memory import View, split
from graphopt.backends.cuda.shared_tile import SharedTile


@dataclass(frozen=True)
class BlockPlace:
    """Where a block works: its thread, its first output (pixel of the batch) and channel, and how many outputs there are."""

    thread: Expr
    first_output: Expr
    first_channel: Expr
    outputs: Expr


@dataclass(frozen=True)
class _Row:
    """One row of the tile as its copying threads see it: the window's origin, where its image begins, if it exists."""

    exists: Expr
    image: Expr
    top: Expr
    left: Expr


class Windows:
    """The copies of one thread into a tile of windows, made inside the launch and before the main loop."""

    def __init__(
        self, plan: ConvPlan, device: Device, place: BlockPlace, x: View, tile: SharedTile
    ) -> None:
        self.plan, self.workload, self.device = plan, plan.workload, device
        self.x, self.tile = x, tile
        per_row = tile.width // plan.vector
        self.column = bind(tirx.floormod(place.thread, per_row) * plan.vector)
        self.row = bind(tirx.floordiv(place.thread, per_row))
        self.row_step = plan.tile.threads // per_row
        w = self.workload
        self.rows = []
        for i in range(tile.rows // self.row_step):
            output = bind(place.first_output + self.row + i * self.row_step)
            image, row, column = split(output, w.y.height, w.y.width)
            self.rows.append(
                _Row(
                    bind(output < place.outputs),
                    bind(image * w.x.height),
                    bind(row * w.stride[0] - w.padding[0]),
                    bind(column * w.stride[1] - w.padding[1]),
                )
            )

    def copy(self, step: Expr, stage: Expr) -> None:
        """Ask for the bytes ``step * width ..`` of k, into a stage of the tile."""
        plan, tile, w = self.plan, self.tile, self.workload
        k = bind(self.column + step * tile.width)
        tap_row, tap_column, channel = self._tap(k)
        down, right = bind(tap_row * w.dilation[0]), bind(tap_column * w.dilation[1])
        base = tile.stage(stage)
        for i, row in enumerate(self.rows):
            line, column = bind(row.top + down), bind(row.left + right)
            inside = tirx.all(
                row.exists,
                k < plan.depth,
                line >= 0,
                line < w.x.height,
                column >= 0,
                column < w.x.width,
            )
            target = tile.place(base, self.row + i * self.row_step, self.column)
            pixel = (row.image + line) * w.x.width + column
            with T.If(inside):
                with T.Then():
                    source = T.address_of(self.x.flat[self.x.at(pixel, channel)])
                    self.device.copy(target, source, plan.vector)
                with T.Else():
                    word = tirx.const(w.x_zero_point * 0x01010101, "uint32")
                    self.device.fill(target, word, plan.vector)

    def _tap(self, k: Expr) -> list[Expr]:
        """Tap row, tap column and channel of an element of k."""
        if self.workload.kernel == (1, 1):
            return [int32(0), int32(0), k]
        return split(k, self.workload.kernel[1], self.plan.tap_channels)
