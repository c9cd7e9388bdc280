"""Layer norm over rows: mean, then the variance of the differences, then scale and shift."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    Buffer,
    Expr,
    bind,
    broadcast,
    constant,
    load,
    multiply_add,
    store,
)
from graphopt.backends.cpu.fold import fold, plus
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import Argument, activation_argument, build, kernel_name, sweep
from graphopt.backends.cpu.tokens import LayerNorm
from graphopt.errors import CompileError

Array = np.ndarray[Any, Any]


def pack_layer_norm(
    workload: LayerNorm, weight: Array | None, bias: Array | None
) -> tuple[Array, Array]:
    """Weight and bias as the kernel takes them: 1 and 0 where the layer has none."""
    channels = workload.x.channels
    scale = np.ones(channels, np.float32) if weight is None else weight.astype(np.float32)
    shift = np.zeros(channels, np.float32) if bias is None else bias.astype(np.float32)
    return scale.reshape(-1), shift.reshape(-1)


def layer_norm(workload: LayerNorm, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(x, weight, bias, y)``; ``CompileError`` where the layouts differ or are not dense."""
    x, y = workload.x, workload.y
    if x != y or not x.is_dense:
        raise CompileError(
            f"layer_norm takes dense rows of one layout, not {x} to {y}; make them so."
        )
    channels = x.channels
    name = kernel_name("layer_norm", f"{x.width}x{channels}", workload, isa.name, threads)
    arguments = [
        activation_argument("x", x),
        Argument("weight", (channels,), "float32"),
        Argument("bias", (channels,), "float32"),
        activation_argument("y", y),
    ]
    share = constant("float32", 1.0 / channels)

    def body(batch: Expr, flats: list[Buffer]) -> None:
        source, weight, bias, target = flats
        loop = T.parallel if threads > 1 else T.serial
        with loop(0, batch * (x.height * x.width)) as row:
            start = bind(row * channels)

            def value(offset: Expr, lanes: int) -> Expr:
                return load(source, start + offset, lanes)

            def square(offset: Expr, lanes: int) -> Expr:
                difference = bind(value(offset, lanes) - broadcast(mean, lanes))
                return difference * difference

            def emit(offset: Expr, lanes: int) -> None:
                difference = value(offset, lanes) - broadcast(mean, lanes)
                scaled = bind(difference * broadcast(inverse, lanes))
                factor, shift = load(weight, offset, lanes), load(bias, offset, lanes)
                store(target, start + offset, multiply_add(isa, scaled, factor, shift))

            mean = bind(fold(channels, isa.lanes, 0.0, plus, value) * share)
            variance = fold(channels, isa.lanes, 0.0, plus, square) * share
            root = T.sqrt(variance + tirx.const(workload.epsilon, "float32"))
            inverse = bind(constant("float32", 1.0) / root)
            sweep(channels, isa.lanes, emit)

    return build(name, arguments, body)
