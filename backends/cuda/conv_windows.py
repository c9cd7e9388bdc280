"""The rows of a convolution's matrix of windows, in shared memory: row m is the window of output m, k its taps' channels.

The matrix is never written down: each thread works out once which windows the rows stand for that it copies, and at each
step where the taps of its bytes lie. Where a window leaves the map the tile holds the zero point, which the bias takes back;
past the last output, and behind the last tap, whose weights are zeros, anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind, select
from graphopt.backends.cpu.workload import Conv2d
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
class _Window:
    """The window of one row: its first pixel in the batch, its row and column in the map, where it goes in the tile."""

    pixel: Expr
    top: Expr
    left: Expr
    target: Expr


def _leaves_map(w: Conv2d) -> bool:
    """True if a window of an output touches the padding."""
    sizes = (w.x.height, w.x.width), (w.y.height, w.y.width)
    axes = zip(*sizes, w.kernel, w.stride, w.padding, w.dilation, strict=True)
    return any(
        before > 0 or (outputs - 1) * stride + (taps - 1) * apart - before >= inputs
        for inputs, outputs, taps, stride, before, apart in axes
    )


class Windows:
    """The copies of one thread into a tile of windows, made inside the launch and before the main loop."""

    def __init__(
        self, plan: ConvPlan, device: Device, place: BlockPlace, x: View, tile: SharedTile
    ) -> None:
        self.plan, self.workload, self.device = plan, plan.workload, device
        self.x, self.tile = x, tile
        per_row = tile.width // plan.vector
        self.column = bind(tirx.floormod(place.thread, per_row) * plan.vector)
        first = bind(tirx.floordiv(place.thread, per_row))
        step = plan.tile.threads // per_row
        rows = range(0, tile.rows, step)
        self.windows = [self._window(place, first + row) for row in rows]

    def _window(self, place: BlockPlace, row: Expr) -> _Window:
        w = self.workload
        output = bind(place.first_output + row)
        image, down, right = split(output, w.y.height, w.y.width)
        there = output < place.outputs
        above = -w.kernel[0] * w.dilation[0]  # a row that no tap brings into the map
        top = bind(select(there, down * w.stride[0] - w.padding[0], int32(above)))
        left = bind(right * w.stride[1] - w.padding[1])
        pixel = bind((image * w.x.height + top) * w.x.width + left)
        return _Window(pixel, top, left, bind(self.tile.offset(row, self.column)))

    def copy(self, step: Expr, stage: Expr, wanted: Expr = True) -> None:
        """Ask for the bytes ``step * width ..`` of k, into a stage of the tile; where not ``wanted``, at most for padding."""
        plan, w, size = self.plan, self.workload, self.plan.product.item_bytes
        k = bind(tirx.floordiv(self.column, size) + step * (self.tile.width // size))
        tap_row, tap_column, channel = self._tap(k)
        down, right = bind(tap_row * w.dilation[0]), bind(tap_column * w.dilation[1])
        tap = bind(down * w.x.width + right)
        # channels that a tap lacks are multiplied by zeros: no harm in integers, but a float there could be NaN
        valid = None
        if plan.tap_channels > w.x.channels and not plan.product.is_integer:
            left = (int32(w.x.channels) - channel) * size
            valid = bind(tirx.min(int32(plan.vector), left))
        base = self.tile.stage(stage)
        for window in self.windows:
            line, column = window.top + down, window.left + right
            inside = tirx.all(
                wanted,
                k < plan.depth,
                line >= 0,
                line < w.x.height,
                column >= 0,
                column < w.x.width,
            )
            self._copy(base + window.target, window.pixel + tap, channel, inside, valid)

    def _copy(self, at: Expr, pixel: Expr, channel: Expr, inside: Expr, valid: Expr | None) -> None:
        """One vector of a window, or of what stands for it outside the map."""
        target = T.address_of(self.tile.memory[at])
        source = T.address_of(self.x.flat[self.x.at(pixel, channel)])
        w, size = self.workload, self.plan.vector
        byte = w.x_zero_point % 256
        if byte != 0 and _leaves_map(w):
            self.device.copy_or(target, source, size, inside, byte)
        elif valid is None:
            self.device.copy_where(target, source, size, inside)
        else:
            self.device.copy_part(target, source, size, bind(select(inside, valid, int32(0))))

    def _tap(self, k: Expr) -> list[Expr]:
        """Tap row, tap column and channel of an element of k."""
        if self.workload.kernel == (1, 1):
            return [int32(0), int32(0), k]
        return split(k, self.workload.kernel[1], self.plan.tap_channels)
