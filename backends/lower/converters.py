"""Operators that TVM's importer lacks or gets wrong, made of Relax operators directly: extremes and where they stand.

NaN counts as the largest and the smallest, and of equal ones the first is taken, as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import relax

from graphopt import ops

Convert = Callable[[fx.Node, Any], Any]


def _dims(value: Any) -> list[int] | None:
    """None for all of them."""
    values = [value] if isinstance(value, int) else list(value or ())
    return values or None


def _is_float(x: Any) -> bool:
    return str(x.ty.dtype).startswith(("float", "bfloat"))


def _nan_mask(importer: Any, x: Any) -> Any:
    return importer.block_builder.emit(relax.op.astype(relax.op.isnan(x), "float32"))


def _extreme(importer: Any, reduce: Any, x: Any, dims: list[int] | None, keep: bool) -> Any:
    emit = importer.block_builder.emit
    best = emit(reduce(x, axis=dims, keepdims=keep))
    if not _is_float(x):
        return best
    count = emit(relax.op.sum(_nan_mask(importer, x), axis=dims, keepdims=keep))
    some = emit(relax.op.greater(count, relax.const(0.0, "float32")))
    return emit(relax.op.where(some, relax.const(float("nan"), x.ty.dtype), best))


def _place(importer: Any, find: Any, x: Any, dim: int | None, keep: bool) -> Any:
    emit = importer.block_builder.emit
    best = emit(find(x, dim, keep))
    if not _is_float(x):
        return best
    mask = _nan_mask(importer, x)
    highest = emit(relax.op.max(mask, axis=_dims(dim) if dim is not None else None, keepdims=keep))
    some = emit(relax.op.greater(highest, relax.const(0.0, "float32")))
    return emit(relax.op.where(some, relax.op.argmax(mask, dim, keep), best))


def _reduced(reduce: Any) -> Convert:
    def convert(node: fx.Node, importer: Any) -> Any:
        a = ops.bind(node)
        return _extreme(importer, reduce, importer.env[a["self"]], _dims(a["dim"]), a["keepdim"])

    return convert


def _placed(find: Any) -> Convert:
    def convert(node: fx.Node, importer: Any) -> Any:
        a = ops.bind(node)
        return _place(importer, find, importer.env[a["self"]], a["dim"], a["keepdim"])

    return convert


def _both(reduce: Any, find: Any) -> Convert:
    def convert(node: fx.Node, importer: Any) -> Any:
        a = ops.bind(node)
        x, dim, keep = importer.env[a["self"]], a["dim"], a["keepdim"]
        values = _extreme(importer, reduce, x, [dim], keep)
        return values, _place(importer, find, x, dim, keep)

    return convert


def _half_matmul(node: fx.Node, importer: Any) -> Any:
    """``graphopt::half_matmul``: float16 in, float32 sums out."""
    a, b = (importer.env[value] for value in node.args)
    return importer.block_builder.emit(relax.op.matmul(a, b, out_dtype="float32"))


CONVERTERS: dict[str, Convert] = {
    "half_matmul.default": _half_matmul,
    "amax.default": _reduced(relax.op.max),
    "amin.default": _reduced(relax.op.min),
    "argmax.default": _placed(relax.op.argmax),
    "argmin.default": _placed(relax.op.argmin),
    "max.dim": _both(relax.op.max, relax.op.argmax),
    "min.dim": _both(relax.op.min, relax.op.argmin),
}
