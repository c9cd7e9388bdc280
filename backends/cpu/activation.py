"""Float activations on vectors: polynomials of about 1e-7 relative error in place of calls into libm, which do not vectorise."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import piecewise
from graphopt.backends.cpu.emit import (
    Expr,
    bind,
    broadcast,
    clamp,
    constant,
    round_to_int,
    select,
    to_float,
    vector,
)
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.workload import Activation

_LN2_HIGH = 0.693359375  # ln 2 in 9 bits: n * high is exact for |n| < 2**15 (Cephes expf)
_LN2_LOW = -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
# erf(x / sqrt 2) / x = P(x**2) / Q(x**2) to 2e-8 for |x| < 5.6: least squares, reweighted towards the largest error
_GELU_P = (
    4.429048081e-08,
    1.271304108e-05,
    3.477014814e-04,
    9.414518934e-03,
    6.875224230e-02,
    7.978844431e-01,
)
_GELU_Q = (
    1.180208969e-06,
    7.510186293e-05,
    1.912978363e-03,
    2.894009370e-02,
    2.528338703e-01,
    1.0,
)
_GELU_END = 5.6

LONG = frozenset(
    {"sigmoid", "silu", "tanh", "gelu"}
)  # too much code to unroll over a register tile: 6 s a kernel


def _splat(value: float, lanes: int) -> Expr:
    return broadcast(tirx.const(value, "float32"), lanes)


def _polynomial(coefficients: tuple[float, ...], x: Expr, lanes: int) -> Expr:
    """Horner's rule, highest power first."""
    value = _splat(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        value = value * x + _splat(coefficient, lanes)
    return value


def exp(x: Expr, lanes: int) -> Expr:
    """``e**x`` in float32 for any finite x: 2**n times a degree-6 polynomial (Cephes expf), clamped to +-87.3."""
    x = bind(clamp(x, -87.3, 87.3, lanes))
    n = bind(round_to_int(x * _splat(math.log2(math.e), lanes), lanes))
    whole = bind(to_float(n, lanes))
    r = bind(x - whole * _splat(_LN2_HIGH, lanes) - whole * _splat(_LN2_LOW, lanes))
    tail = _polynomial(_EXP, r, lanes)
    power = T.reinterpret(
        vector("float32", lanes),
        (n + constant("int32", 127, lanes)) << constant("int32", 23, lanes),
    )
    return (tail * (r * r) + r + _splat(1.0, lanes)) * power


def sigmoid(x: Expr, lanes: int) -> Expr:
    """``1 / (1 + e**-x)``."""
    one = _splat(1.0, lanes)
    return one / (one + exp(_splat(0.0, lanes) - x, lanes))


def tanh(x: Expr, lanes: int) -> Expr:
    """Odd polynomial below 0.625, ``1 - 2 / (e**(2|x|) + 1)`` above (Cephes tanhf)."""
    x = bind(x)
    magnitude = bind(_absolute(x, lanes))
    square = bind(x * x)
    small = bind(_polynomial(_TANH, square, lanes) * square * x + x)
    one = _splat(1.0, lanes)
    above = bind(one - _splat(2.0, lanes) / (exp(magnitude + magnitude, lanes) + one))
    signed = select(x < _splat(0.0, lanes), _splat(0.0, lanes) - above, above)
    return select(magnitude < _splat(0.625, lanes), small, signed)


def gelu(x: Expr, lanes: int) -> Expr:
    """``x * (1 + erf(x / sqrt 2)) / 2``, absolute error below 1e-6 like torch's own; ``max(x, 0)`` beyond +-5.6."""
    x = bind(x)
    square = bind(x * x)
    erf = x * _polynomial(_GELU_P, square, lanes) / _polynomial(_GELU_Q, square, lanes)
    half = bind(x * _splat(0.5, lanes))
    beyond = square >= _splat(_GELU_END**2, lanes)  # false for NaN, which stays
    return select(beyond, T.max(x, _splat(0.0, lanes)), half + half * erf)


def _absolute(x: Expr, lanes: int) -> Expr:
    return T.max(x, _splat(0.0, lanes) - x)


def apply_activation(
    activation: Activation | None, x: Expr, lanes: int, isa: Isa | None = None
) -> Expr:
    """``activation(x)`` of a float32 vector; ``x`` itself where there is none. Emits bindings.

    With ``isa`` in the form that suits its row best.
    """
    if activation is None:
        return x
    if isa is not None and activation.name == "gelu" and piecewise.can_look_up(isa, lanes):
        return piecewise.gelu(isa, x)
    return _FUNCTIONS[activation.name](activation, bind(x), lanes)


def _relu(_: Activation, x: Expr, lanes: int) -> Expr:
    return T.max(x, _splat(0.0, lanes))


def _relu6(_: Activation, x: Expr, lanes: int) -> Expr:
    return clamp(x, 0.0, 6.0, lanes)


def _clamp(activation: Activation, x: Expr, lanes: int) -> Expr:
    return clamp(x, activation.low, activation.high, lanes)


def _leaky_relu(activation: Activation, x: Expr, lanes: int) -> Expr:
    return select(x < _splat(0.0, lanes), x * _splat(activation.low, lanes), x)


def _sigmoid(_: Activation, x: Expr, lanes: int) -> Expr:
    return sigmoid(x, lanes)


def _silu(_: Activation, x: Expr, lanes: int) -> Expr:
    return x * sigmoid(x, lanes)


def _hard_sigmoid(_: Activation, x: Expr, lanes: int) -> Expr:
    return clamp(x + _splat(3.0, lanes), 0.0, 6.0, lanes) * _splat(1.0 / 6.0, lanes)


def _hard_swish(activation: Activation, x: Expr, lanes: int) -> Expr:
    return x * _hard_sigmoid(activation, x, lanes)


def _tanh(_: Activation, x: Expr, lanes: int) -> Expr:
    return tanh(x, lanes)


def _gelu(_: Activation, x: Expr, lanes: int) -> Expr:
    return gelu(x, lanes)


_FUNCTIONS = {
    "relu": _relu,
    "relu6": _relu6,
    "clamp": _clamp,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": _hard_swish,
    "tanh": _tanh,
    "gelu": _gelu,
}
