"""The vector epilogue: what happens between the last product and the store, on expressions of any number of lanes.

The order of float operations is the definition's: one product, a clamp, a rounding, then integers. No product feeds a
sum in float on the integer path, so there is nothing for LLVM to contract.
"""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.activation import apply_activation
from graphopt.backends.cpu.emit import (
    Expr,
    bind,
    clamp,
    constant,
    round_to_int,
    to_float,
    vector,
)
from graphopt.backends.cpu.workload import Epilogue, QuantizedAdd, Requantize


def round_and_clamp(requantize: Requantize | QuantizedAdd, value: Expr, lanes: int) -> Expr:
    """``zero_point + rint(clamp(value, qmin - zero_point, qmax - zero_point))`` of a float32 value, as int32."""
    low = requantize.qmin - requantize.zero_point
    high = requantize.qmax - requantize.zero_point
    rounded = round_to_int(clamp(value, low, high, lanes), lanes)
    return rounded + constant("int32", requantize.zero_point, lanes)


def requantize(parameters: Requantize, accumulator: Expr, multiplier: Expr, lanes: int) -> Expr:
    """``zero_point + rint(clamp(float32(accumulator) * multiplier, ...))`` as int32."""
    return round_and_clamp(parameters, to_float(accumulator, lanes) * multiplier, lanes)


def quantized_add(add: QuantizedAdd, a: Expr, b: Expr, lanes: int) -> Expr:
    """``QuantizedAdd`` of two int32 vectors, as int32.

    Both zero points go into one constant; int32 wraps, so that the sum is the definition's whatever the order.
    """
    offset = add.a_zero_point * add.a_multiplier + add.b_zero_point * add.b_multiplier
    v = a * constant("int32", add.a_multiplier, lanes) + b * constant(
        "int32", add.b_multiplier, lanes
    )
    v = v - constant("int32", offset, lanes)
    scaled = to_float(v, lanes) * constant("float32", 2.0**-add.shift, lanes)
    return round_and_clamp(add, scaled, lanes)


def apply_epilogue(
    epilogue: Epilogue,
    accumulator: Expr,
    lanes: int,
    multiplier: Expr | None = None,
    residual: Expr | None = None,
    out_dtype: str = "float32",
) -> Expr:
    """Turn ``lanes`` accumulators, the bias already in them, into the elements to store, of ``out_dtype``.

    ``accumulator`` is int32 where ``multiplier`` (float32, one a lane) is given, else float32. ``residual`` is the raw
    vector of the residual tensor, where the epilogue takes one. Emits bindings: call it inside an open builder.
    """
    if multiplier is None:
        v = accumulator if residual is None else accumulator + residual
        return apply_activation(epilogue.activation, v, lanes)
    if epilogue.requantize is None:
        v = to_float(accumulator, lanes) * multiplier
        return apply_activation(epilogue.activation, v, lanes)
    q = requantize(epilogue.requantize, accumulator, multiplier, lanes)
    if epilogue.residual_add is not None and residual is not None:
        b = T.cast(residual, vector("int32", lanes))
        q = quantized_add(epilogue.residual_add, bind(q), b, lanes)
    return T.cast(q, vector(out_dtype, lanes))
