"""Integer layers that are slower than their float forms on a target: ``integerize`` leaves them in float.

Each layer is judged alone: fake quantization stays at its input and output, so a float layer between two others pays for a
dequantize and a quantize whatever they are. Times are measured ones where a table has them, else the cost model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from graphopt.arrays import to_numpy
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.rivals import Rivals, estimate, rivals
from graphopt.backends.cpu.winograd_plan import fits, sums_fit
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.integerize.emitter import FLOAT_LAYER
from graphopt.backends.lower.convolution import ConvolutionStep
from graphopt.backends.lower.plan import Plan, make_plan
from graphopt.backends.lower.step import image_layout, padded_rows
from graphopt.program import Program

CALL_SECONDS = 0.5e-6  # a further kernel: the virtual machine's call
_MEASURED_GAIN = 0.95  # of the int8 time, above which the layer stays int8
_ESTIMATED_GAIN = 0.75  # the cost model's ratio is right within a third
_WORTH_MEASURING = 1.5  # of the int8 time: what is estimated above it was never faster


@dataclass(frozen=True)
class Times:
    """Seconds of a layer's integer form, and of the kernels in its place if it stays float."""

    int8: float
    float32: float


def integer_layers(program: Program) -> dict[str, Rivals]:
    """The integer layers of a program by the name of the float layer that they were."""
    plan = make_plan(program)
    found: dict[str, Rivals] = {}
    for step in plan.steps.values():
        name = step.nodes[0].meta.get(FLOAT_LAYER)
        if name is not None and isinstance(step, ConvolutionStep):
            found[name] = _rivals(plan, step)
    return found


def _rivals(plan: Plan, step: ConvolutionStep) -> Rivals:
    def layout(value: fx.Node, plain: bool) -> Layout:
        if not plain:
            return plan.layouts[plan.root(value)]
        return padded_rows(value) if step.is_rows else image_layout(value)

    inputs = [layout(*pair) for pair in zip(step.inputs, step.plain_inputs, strict=True)]
    workload = step.workload(inputs, layout(step.output, step.plain_output))
    weight, bias = (
        None if node is None else to_numpy(plan.program.tensor(node))
        for node in (step.constants.weight, step.constants.bias)
    )
    return rivals(workload, fits(workload) and weight is not None and sums_fit(weight, bias))


def worth_measuring(layer: Rivals, isa: Isa, threads: int) -> bool:
    """True where the cost model does not rule the float form out."""
    cycles = estimate(layer, isa, threads)
    return cycles is None or cycles[1] < _WORTH_MEASURING * cycles[0]


def faster_in_float(
    layers: Mapping[str, Rivals], isa: Isa, threads: int, measured: Mapping[str, Times]
) -> dict[str, str]:
    """Which layers stay float, and why. ``measured`` has the times of some by ``Rivals.key``."""
    reasons = {}
    for name, layer in layers.items():
        times = measured.get(layer.key)
        reason = _estimated(layer, isa, threads) if times is None else _measured(layer, times)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _measured(layer: Rivals, times: Times) -> str | None:
    calls = len(layer.float32) - 1
    float32 = times.float32 + calls * CALL_SECONDS
    if float32 >= _MEASURED_GAIN * times.int8:
        return None
    int8, float32 = times.int8 * 1e6, float32 * 1e6
    return f"int8 {int8:.1f} us, float {float32:.1f} us with conversions (measured)"


def _estimated(layer: Rivals, isa: Isa, threads: int) -> str | None:
    cycles = estimate(layer, isa, threads)
    if cycles is None or cycles[1] >= _ESTIMATED_GAIN * cycles[0]:
        return None
    int8, float32 = (f"{count / 1e3:.1f} thousand cycles" for count in cycles)
    return f"int8 {int8}, float {float32} with conversions (estimated)"
