"""An integer layer beside what would stand in its place if it stayed float, and the cost model's time of both.

The float form is the same operator on float32 between the borders of fake quantization: a dequantize of its input and,
where the result is requantized, a quantize of it; a residual sum that the integer form carries is then a kernel of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from graphopt.backends.cpu.candidates import tuned_form
from graphopt.backends.cpu.conv_plan import estimate as estimate_direct
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.winograd_plan import estimate as estimate_winograd
from graphopt.backends.cpu.winograd_plan import fits, is_faster
from graphopt.backends.cpu.workload import Activation, Add, Conv2d, Convert, Epilogue, Layout

Call = Conv2d | Convert | Add

# The cost models rank forms of one element type; these bring both to cycles of the machine.
_DOT_SCALE = 1.4  # of a direct int8 layer whose dot products accumulate
_PAIRS_SCALE = 0.6  # of one whose int16 pairs are multiplied and added by instructions of their own
_PRODUCT_AND_SUM_SCALE = 1.35  # of a float32 layer without fma
_DEQUANTIZE_CYCLES = 0.6  # an element: bound by the memory on every row
_QUANTIZE_CYCLES = 0.4
_ADD_CYCLES = 0.5
_CALL_CYCLES = 2000.0  # a kernel: the virtual machine's 0.5 us


@dataclass(frozen=True)
class Rivals:
    """``sums_fit``: the int8 weights allow Winograd's algorithm."""

    int8: Conv2d
    float32: tuple[Call, ...]
    sums_fit: bool

    @property
    def key(self) -> str:
        """What a store files the comparison under."""
        text = f"int8 or float32 {self!r}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def _as_float(layout: Layout) -> Layout:
    whole = dataclasses.replace(layout, dtype="float32", first_channel=0, shared=False)
    return dataclasses.replace(whole, channel_stride=layout.channels)


def rivals(workload: Conv2d, sums_fit: bool) -> Rivals:
    """Both forms of an integer layer, without the numbers of its calibration."""
    int8 = tuned_form(workload)
    requantize, add = int8.epilogue.requantize, int8.epilogue.residual_add
    activation = int8.epilogue.activation
    if requantize is not None and activation is None:
        activation = Activation("relu")
    x, y = _as_float(int8.x), _as_float(int8.y)
    layer = dataclasses.replace(
        int8, x=x, y=y, epilogue=Epilogue(activation=activation), residual=None
    )
    calls: list[Call] = [Convert(int8.x, x), layer]
    if requantize is not None:
        calls.append(Convert(y, int8.y, requantize=requantize))
    if add is not None and int8.residual is not None:
        calls.append(Add(int8.y, int8.residual, int8.y, add))
    return Rivals(int8, tuple(calls), sums_fit)


def is_depthwise(workload: Conv2d) -> bool:
    """True for the layers that have a kernel of one filter a channel."""
    return workload.groups == workload.x.channels == workload.y.channels > 1


def is_winograd(workload: Conv2d, isa: Isa, threads: int, sums_fit: bool) -> bool:
    """True for the layers that are lowered by Winograd's algorithm."""
    allowed = workload.x.dtype == "float32" or sums_fit
    return allowed and fits(workload) and is_faster(workload, isa, threads)


def estimate(rivals: Rivals, isa: Isa, threads: int) -> tuple[float, float] | None:
    """Estimated cycles of the integer and the float form on one thread; None for depthwise layers.

    Of 20 layers each on AVX-512 VNNI, AVX2 and SSE4, the ratio of the two is within a third of the measured one, but for
    layers of a wide margin: there float is up to twice as slow, or as fast, as this says. Winograd's form of few channels on
    AVX-512 without VNNI takes twice the estimate: such a layer stays int8 until it is measured.
    """
    if is_depthwise(rivals.int8):
        return None
    cycles = [_call_cycles(call, isa, threads, rivals.sums_fit) for call in rivals.float32]
    return _call_cycles(rivals.int8, isa, threads, rivals.sums_fit), sum(cycles)


def _call_cycles(call: Call, isa: Isa, threads: int, sums_fit: bool) -> float:
    if isinstance(call, Add):
        return _CALL_CYCLES + _elements(call.y) * _ADD_CYCLES
    if isinstance(call, Convert):
        cycles = _DEQUANTIZE_CYCLES if call.requantize is None else _QUANTIZE_CYCLES
        return _CALL_CYCLES + _elements(call.y) * cycles
    winograd = is_winograd(call, isa, threads, sums_fit)
    cycles = estimate_winograd(call, isa, threads) if winograd else estimate_direct(call, isa)
    if call.x.dtype == "float32":
        scale = 1.0 if isa.fma else _PRODUCT_AND_SUM_SCALE
    elif isa.dot_accumulates:
        scale = 1.0 if winograd else _DOT_SCALE
    else:
        scale = _PAIRS_SCALE
    return _CALL_CYCLES + cycles * scale


def _elements(layout: Layout) -> int:
    return (layout.batch or 1) * layout.rows * layout.columns * layout.channels
