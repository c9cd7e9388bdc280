"""Functions of one variable as polynomials on equal intervals, their coefficients looked up by one instruction each.

A lookup is no multiplication: beside dot products, which need those pipes, gelu takes half of what a quotient of polynomials
takes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind, constant, intrinsic, vector
from graphopt.backends.cpu.isa import Isa

INTERVALS = 16  # elements of the vector that a lookup picks from
_DEGREE = 4
_GELU_END = 5.6
_STEP = float(np.float32(_GELU_END / (INTERVALS - 1.5)))  # interval k lies around k * _STEP
_ANCHOR = 1.5 * 2.0**23  # floats near it are whole: their last bits are k

Array = np.ndarray[Any, Any]


def _gelu_tail(u: Array, start: float = 0.0) -> Array:
    """``relu(t) - gelu(t) = t * (1 - erf(t / sqrt 2)) / 2`` of ``t = start + u >= 0``."""
    return np.array([0.5 * t * math.erfc(t / math.sqrt(2.0)) for t in u + start])


def _fit(function: Callable[[Array], Array], degree: int, low: float) -> Array:
    """Coefficients of the polynomial that interpolates from ``low`` to half a step, lowest power first."""
    fit = Chebyshev.interpolate(function, degree, [low, _STEP / 2])
    coefficients: Array = fit.convert(kind=Polynomial).coef
    return coefficients


@cache
def _gelu_coefficients() -> Array:
    """``[power, interval]`` of ``_gelu_tail``, to 4e-7; 0 in the last interval, which is beyond the end."""
    table = np.zeros((_DEGREE + 1, INTERVALS))
    for k in range(1, INTERVALS - 1):
        table[:, k] = _fit(partial(_gelu_tail, start=k * _STEP), _DEGREE, -_STEP / 2)
    # the first without its factor t: the tail of 0 is 0
    table[1:, 0] = _fit(lambda t: _gelu_tail(t) / t, _DEGREE - 1, 0.0)
    return table.astype(np.float32)


def can_look_up(isa: Isa, lanes: int) -> bool:
    """True for whole vectors of a row that has the instruction."""
    return bool(isa.lookup) and lanes == INTERVALS


def gelu(isa: Isa, x: Expr) -> Expr:
    """``x * (1 + erf(x / sqrt 2)) / 2`` of one vector, to 1e-6 absolute: ``max(x, 0)`` less the tail at ``|x|``.

    NaN stays: of two operands, one of them NaN, minimum and maximum are the second.
    """
    lanes, floats = INTERVALS, vector("float32", INTERVALS)
    zero, anchor = (constant("float32", v, lanes) for v in (0.0, _ANCHOR))
    x = bind(x)
    magnitude = T.max(x, zero - x)
    t = bind(T.min(constant("float32", _GELU_END + _STEP / 4, lanes), magnitude))
    # behind a fence: TVM would have k + anchor - anchor be k before it is rounded
    near = t * constant("float32", 1.0 / _STEP, lanes) + anchor
    whole = bind(intrinsic(floats, "llvm.arithmetic.fence", near))
    k = bind(whole - anchor)
    u = bind(t - k * constant("float32", _STEP, lanes))
    index = bind(T.reinterpret(vector("int32", lanes), whole))
    tail: Expr = None
    for row in _gelu_coefficients()[::-1]:
        elements = [tirx.const(float(value), "float32") for value in row]
        looked_up = intrinsic(floats, isa.lookup, tirx.Shuffle(elements, list(range(lanes))), index)
        tail = looked_up if tail is None else tail * u + looked_up
    return T.max(x, zero) - tail
