"""From an int32 sum to the element that is stored: scalar expressions in the definition's order of float operations."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind, select
from graphopt.backends.cpu.workload import Activation, Epilogue, QuantizedAdd, Requantize
from graphopt.backends.cuda.device import multiply_float, round_to_int

FLOATS = ("float32", "float16")  # of activations; kernels compute in float32


def int32(value: int) -> Expr:
    return tirx.const(value, "int32")


def float32(value: float) -> Expr:
    return tirx.const(value, "float32")


def to_float(value: Expr) -> Expr:
    """float32 of an int32, rounded half to even, or of a float16, exactly."""
    return T.cast(value, "float32")


def round_and_clamp(parameters: Requantize | QuantizedAdd, value: Expr) -> Expr:
    """``zero_point + rint(clamp(value, qmin - zero_point, qmax - zero_point))`` as int32.

    NaN becomes qmin: CUDA's ``max`` of floats is ``fmaxf``, which takes the other operand then.
    """
    low = float32(parameters.qmin - parameters.zero_point)
    high = float32(parameters.qmax - parameters.zero_point)
    clamped = tirx.min(tirx.max(value, low), high)
    return round_to_int(clamped) + int32(parameters.zero_point)


def requantize(parameters: Requantize, accumulator: Expr, multiplier: Expr) -> Expr:
    """``Requantize`` of an int32, as int32."""
    return round_and_clamp(parameters, multiply_float(to_float(accumulator), multiplier))


def quantized_add(add: QuantizedAdd, a: Expr, b: Expr) -> Expr:
    """``QuantizedAdd`` of two int32, as int32."""
    v = (a - int32(add.a_zero_point)) * int32(add.a_multiplier)
    v = v + (b - int32(add.b_zero_point)) * int32(add.b_multiplier)
    return round_and_clamp(add, multiply_float(to_float(v), float32(2.0**-add.shift)))


def _clamp(value: Expr, low: float, high: float) -> Expr:
    """By comparisons, which keep a NaN as torch does."""
    raised = bind(select(value < float32(low), float32(low), value))
    return select(raised > float32(high), float32(high), raised)


def _hard_sigmoid(value: Expr) -> Expr:
    return _clamp(bind(value + float32(3.0)), 0.0, 6.0) / float32(6.0)


def apply_activation(activation: Activation | None, value: Expr) -> Expr:
    """The activation of a float32."""
    if activation is None:
        return value
    value, name, one = bind(value), activation.name, float32(1.0)
    if name in ("relu", "relu6", "clamp"):
        bounds = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
        low, high = bounds.get(name, (activation.low, activation.high))
        return _clamp(value, low, high)
    if name == "leaky_relu":
        return select(value > float32(0.0), value, value * float32(activation.low))
    if name == "hard_sigmoid":
        return _hard_sigmoid(value)
    if name == "hard_swish":
        return value * _hard_sigmoid(value)
    if name == "tanh":
        return tirx.tanh(value)
    if name == "gelu":
        return value * float32(0.5) * (one + tirx.erf(value * float32(0.5**0.5)))
    sigmoid = one / (one + tirx.exp(float32(0.0) - value))
    return value * sigmoid if name == "silu" else sigmoid


def finish(epilogue: Epilogue, accumulator: Expr, multiplier: Expr, residual: Expr) -> Expr:
    """The element to store of an int32 sum with its bias; ``residual`` is read where the epilogue adds one."""
    if epilogue.requantize is None:
        scaled = multiply_float(to_float(accumulator), multiplier)
        return apply_activation(epilogue.activation, scaled)
    q = requantize(epilogue.requantize, accumulator, multiplier)
    if epilogue.residual_add is None:
        return q
    return quantized_add(epilogue.residual_add, bind(q), T.cast(residual, "int32"))
