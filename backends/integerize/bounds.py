"""Activations that clamp: ``relu``, ``relu6``, ``hardtanh``, ``clamp`` as real bounds, and those as integer ranges."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from graphopt import ops
from graphopt.integer.arithmetic import QParams, float32


def of(node: fx.Node) -> tuple[float, float] | None:
    """``(low, high)`` with ``node = min(max(x, low), high)``, or None for any other operator."""
    arguments = ops.bind(node) if ops.info(node) is not None else {}
    if ops.is_op(node, "relu"):
        return 0.0, math.inf
    if ops.is_op(node, "relu6"):
        return 0.0, 6.0
    if ops.is_op(node, "hardtanh"):
        return _pair(arguments["min_val"], arguments["max_val"])
    if ops.is_op(node, "clamp"):
        return _pair(arguments["min"], arguments["max"])
    if ops.is_op(node, "clamp_min"):
        return _pair(arguments["min"], None)
    return None


def _pair(low: object, high: object) -> tuple[float, float] | None:
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    least = -math.inf if low is None else float(low)  # type: ignore[arg-type]
    most = math.inf if high is None else float(high)  # type: ignore[arg-type]
    return (min(least, most), most) if least == least and most == most else None


def narrow(qparams: QParams, low: float, high: float) -> QParams:
    """The range of ``quantize(clamp(v, low, high))``: quantize is monotone, so it is the clamp of ``quantize(v)``."""
    return replace(qparams, qmin=qparams.quantize(low), qmax=qparams.quantize(high))


def is_exact(qparams: QParams, low: float, high: float) -> bool:
    """True where clamping dequantized values gives values on the same grid."""
    least, most = (real(qparams, q) for q in (qparams.qmin, qparams.qmax))
    return (low <= least or _on_grid(qparams, low)) and (high >= most or _on_grid(qparams, high))


def _on_grid(qparams: QParams, bound: float) -> bool:
    return real(qparams, qparams.quantize(bound)) == float32(bound)


def real(qparams: QParams, q: int) -> float:
    """``scale * (q - zero_point)`` in float32."""
    return float32(qparams.scale * (q - qparams.zero_point))
