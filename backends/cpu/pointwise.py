"""Element-wise sums and products of two activations in NHWC, whatever their margins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.activation import apply_activation
from graphopt.backends.cpu.emit import Buffer, Expr, bind, vector
from graphopt.backends.cpu.epilogue import quantized_add
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.stream import View, activation_argument, build, elementwise, kernel_name
from graphopt.backends.cpu.workload import Add, Layout, Mul
from graphopt.errors import CompileError


def _shape(layout: Layout) -> tuple[int | None, int, int, int]:
    return layout.batch, layout.height, layout.width, layout.channels


def _binary(
    kind: str,
    workload: Add | Mul,
    isa: Isa,
    threads: int,
    expression: Callable[[list[Expr], int], Expr],
) -> PrimFunc:
    a, b, y = workload.a, workload.b, workload.y
    key = replace(workload, a=replace(a, fill=0), b=replace(b, fill=0))
    legible = f"{y.height}x{y.width}x{y.channels}"
    name = kernel_name(kind, legible, key, isa.name, threads)
    arguments = [activation_argument(n, layout) for n, layout in (("a", a), ("b", b), ("y", y))]

    def body(batch: Expr, flats: list[Buffer]) -> None:
        views = [View(layout, f, batch) for layout, f in zip((a, b, y), flats, strict=True)]
        elementwise(views[:2], views[2], isa.lanes, isa.vector_bytes, threads, expression)

    return build(name, arguments, body)


def add(workload: Add, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(a, b, y)`` of a residual sum; ``CompileError`` where the logical shapes differ."""
    shapes = {_shape(workload.a), _shape(workload.b), _shape(workload.y)}
    if len(shapes) > 1:
        raise CompileError(
            f"add takes tensors of one shape, not {_shape(workload.a)} and {_shape(workload.b)} "
            f"to {_shape(workload.y)}; broadcast before it."
        )
    parameters = workload.add

    def expression(values: list[Expr], lanes: int) -> Expr:
        a, b = values
        if parameters is None:
            return apply_activation(workload.activation, bind(a + b), lanes)
        wide = vector("int32", lanes)
        q = quantized_add(parameters, T.cast(a, wide), T.cast(b, wide), lanes)
        return T.cast(q, vector(workload.y.dtype, lanes))

    return _binary("add", workload, isa, threads, expression)


def mul(workload: Mul, isa: Isa, threads: int) -> PrimFunc:
    """The kernel ``(a, b, y)`` of a float product, b of a's shape or ``N x 1 x 1 x C``; else ``CompileError``."""
    a, b, y = (_shape(layout) for layout in (workload.a, workload.b, workload.y))
    if a != y or b not in (a, (a[0], 1, 1, a[3])):
        raise CompileError(
            f"mul takes b of shape {a} or {(a[0], 1, 1, a[3])}, not {b} to {y}; broadcast before it."
        )

    def expression(values: list[Expr], lanes: int) -> Expr:
        return apply_activation(workload.activation, bind(values[0] * values[1]), lanes)

    return _binary("mul", workload, isa, threads, expression)
