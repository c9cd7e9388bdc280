"""Weights for Winograd's F(4, 3): stored as the 9 taps, transformed once when a session loads them.

The transformed weights take 36 int16 for 9 int8 (8 times the bytes), so that a file holds the taps, and a function in
the model's own library makes the others: ``[block][point][step][vector][lane]``, int16 pairs of input channels or float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.emit import Expr, bind
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.winograd_plan import WinogradPlan, plan_winograd
from graphopt.backends.cpu.winograd_transform import POINTS, WINDOW, transform_weights
from graphopt.backends.cpu.workload import Conv2d

Array = npt.NDArray[np.generic]
_TAPS = 9


def pack_winograd(
    workload: Conv2d,
    isa: Isa,
    threads: int,
    weight: Array,
    bias: Array | None,
    multiplier: Array | None,
) -> list[Array]:
    """The constant arguments in order: taps ``[3 * 3][in][out]``, bias and, for uint8 activations, the multiplier.

    ``weight`` is OIHW (int8 or float32), ``bias`` [O], ``multiplier`` [O]. Channels are padded with zeros.
    The bias is ``folded_bias``.
    """
    plan = plan_winograd(workload, isa, threads)
    taps = np.zeros((_TAPS, plan.in_channels, plan.packed_channels), weight.dtype)
    out, inputs = weight.shape[:2]
    taps[:, :inputs, :out] = weight.transpose(2, 3, 1, 0).reshape(_TAPS, inputs, out)

    def padded(values: Array) -> Array:
        whole = np.zeros(plan.packed_channels, values.dtype)
        whole[:out] = values
        return whole

    constants = [taps, padded(folded_bias(workload, weight, bias))]
    return constants if multiplier is None else [*constants, padded(multiplier.astype(np.float32))]


class _Transform:
    def __init__(self, plan: WinogradPlan, integer: bool, name: str) -> None:
        self.plan = plan
        self.integer = integer
        self.name = name

    def build(self) -> tvm.tirx.PrimFunc:
        plan = self.plan
        source, target = ("int8", "int32") if self.integer else ("float32", "float32")
        with emit.kernel(self.name) as builder:
            shape = (_TAPS, plan.in_channels, plan.packed_channels)
            taps = T.arg("taps", T.buffer(shape, source))
            self.weight = T.arg("weight", T.buffer((plan.packed_weights,), target))
            self.taps = emit.flat(taps)
            if plan.full_blocks:
                with emit.loop(plan.full_blocks) as block:
                    self._block(block, plan.vectors)
            if plan.tail_channels:
                self._block(plan.full_blocks, -(-plan.tail_channels // plan.lanes))
        return builder.get()

    def _block(self, block: Expr, vectors: int) -> None:
        plan = self.plan
        first = bind(block * plan.vectors)
        start = bind(first * (POINTS * plan.steps * plan.lanes))
        with emit.loop(plan.steps) as k, emit.loop(vectors) as v:
            channel = bind((first + v) * plan.lanes)
            if self.integer:
                even = self._points(2 * k, channel)
                odd = self._points(2 * k + 1, channel)
                low = emit.constant("int32", 0xFFFF, plan.lanes)
                high = emit.constant("int32", 16, plan.lanes)
                points = [(a & low) | (b << high) for a, b in zip(even, odd, strict=True)]
            else:
                points = self._points(k, channel)
            for point, value in enumerate(points):
                offset = ((point * plan.steps + k) * vectors + v) * plan.lanes
                emit.store(self.weight, start + offset, value)

    def _points(self, i: Expr, channel: Expr) -> list[Expr]:
        """``G w G^T`` of one input channel, a vector of output channels; float64 between float32."""
        plan = self.plan
        wide = emit.vector("int32" if self.integer else "float64", plan.lanes)
        columns = []
        for s in range(3):
            taps = []
            for r in range(3):
                index = ((r * 3 + s) * plan.in_channels + i) * plan.packed_channels + channel
                taps.append(bind(T.cast(emit.load(self.taps, index, plan.lanes), wide)))
            columns.append(transform_weights(taps, self.integer))
        points = []
        for r in range(WINDOW):
            row = transform_weights([column[r] for column in columns], self.integer)
            points += row if self.integer else [self._narrow(value) for value in row]
        return points

    def _narrow(self, value: Expr) -> Expr:
        return bind(T.cast(value, emit.vector("float32", self.plan.lanes)))


def weight_transform(workload: Conv2d, isa: Isa, threads: int) -> tvm.tirx.PrimFunc:
    """A PrimFunc on ``taps, weight``: what a session runs once on the packed taps."""
    plan = plan_winograd(workload, isa, threads)
    integer = workload.x.dtype == "uint8"
    kind = "s8" if integer else "f32"
    widths = f"{plan.in_channels}_{plan.out_channels}_{plan.vectors}x{plan.lanes}"
    return _Transform(plan, integer, f"winograd_weights_{kind}_{widths}").build()
