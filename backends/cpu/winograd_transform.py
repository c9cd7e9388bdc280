"""The one-dimensional transforms of Winograd's F(m, 3): ``y = A^T ((G w) * (B^T d))``, m + 2 products for m outputs of 3 taps.

Points 1, 0, infinity, -1, 2, -2 (Winograd 1980; Lavin & Gray 2016), of which the first m + 2 serve m = 1 to 4 outputs. What
depends on m besides is a factor at every point, and ``B^T`` takes it: one set of transformed weights serves the whole tiles of
a map, F(4, 3), and the smaller ones at its right and lower ends.
On integers everything is exact modulo 2**32: ``G`` is scaled by 24 (at infinity by 12, which ``A^T`` doubles), so that a
tile comes out 576 times too large; 576 is 64 * 9, and 9 has an inverse modulo 2**32. What is left after a product with it is
64 y, a number that int32 holds as long as ``-2**25 <= y < 2**25``, and whose float32 is 64 times that of y.
Ranges: of bytes ``B^T d B`` stays within 90 * 255 = 22,950, of int8 weights ``G w G^T`` within 144 * 128 = 18,432: both are
int16.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.cpu.emit import Expr, bind, constant

TILE = 4  # outputs a side of a whole tile
WINDOW = 6  # inputs a side
POINTS = WINDOW * WINDOW
LARGEST_SUM = 2**25 - 1
OUTPUT_SCALE = 64
BIAS_POINT = 0  # row and column of the point whose product reaches every output with weight 1
_INVERSE_OF_9 = pow(9, -1, 2**32)
_FLOAT_SCALES = (-1 / 6, 1 / 4, 1.0, -1 / 6, 1 / 24, 1 / 24)
_INTEGER_SCALES = (-4, 6, 12, -4, 1, 1)


def _scaled(value: Expr, factor: float) -> Expr:
    dtype = value.ty.dtype
    element = str(dtype).split("x")[0]
    return value if factor == 1 else value * constant(element, factor, dtype.lanes)


def _product(value: Expr, factor: float) -> Expr:
    return bind(_scaled(bind(value), factor))


def transform_input(d: Sequence[Expr]) -> list[Expr]:
    """``B^T d`` of 3 to 6 values."""
    if len(d) == 3:
        return [_product(d[1], -6), _product(d[0] - d[1], 4), bind(d[2] - d[1])]
    if len(d) == 4:
        near = [_product(d[1] + d[2], -3), _product(d[0] - d[2], 4)]
        return [*near, bind(d[3] - d[1]), _product(d[1] - d[2], 3)]
    f = bind(d[3] - d[1])
    f2 = bind(f + f)
    if len(d) == 5:
        double = bind(d[0] - d[2])
        return [
            _product(f - (d[1] + d[2]), 3),
            bind(f2 + _scaled(double, 4)),
            bind((d[4] - d[2]) - f2),
            bind(f - _scaled(d[2] - d[1], 3)),
            bind(f2 + f2),
        ]
    e = bind(d[4] - d[2])
    p = bind(d[4] - _scaled(d[2], 4))
    q = bind(d[3] - _scaled(d[1], 4))
    return [
        bind(p + q),
        bind(_scaled(d[0] - d[2], 4) + e),
        bind((d[5] - d[3]) - (f2 + f2)),
        bind(p - q),
        bind(e + f2),
        bind(e - f2),
    ]


def transform_weights(w: Sequence[Expr], integer: bool) -> list[Expr]:
    """``G w`` of 3 values; integers scaled, see above."""
    even = bind(w[0] + w[2])
    far = bind(w[0] + _scaled(w[2], 4))
    near = bind(w[1] + w[1])
    rows = [even + w[1], w[0], w[2], even - w[1], far + near, far - near]
    scales = _INTEGER_SCALES if integer else _FLOAT_SCALES
    return [bind(_scaled(row, scale)) for row, scale in zip(rows, scales, strict=True)]


def transform_output(m: Sequence[Expr], integer: bool) -> list[Expr]:
    """``A^T m`` of 3 to 6 values."""
    last = m[2] + m[2] if integer else m[2]
    if len(m) == 3:
        return [bind(m[0] + m[1] + last)]
    a, b = bind(m[0] + m[3]), bind(m[0] - m[3])
    if len(m) == 4:
        return [bind(m[1] + a), bind(b + last)]
    if len(m) == 5:
        c = d = m[4]
    else:
        c, d = bind(m[4] + m[5]), bind(m[4] - m[5])
    d2 = bind(d + d)
    rows = [bind(m[1] + a + c), bind(b + d2), a + _scaled(c, 4)]
    if len(m) == 5:
        return [*rows[:2], bind(rows[2] + last)]
    return [*rows[:2], bind(rows[2]), bind(b + _scaled(d2, 4) + last)]


def scaled_bias(bias: Expr, lanes: int) -> Expr:
    """What, added to the product at point (1, 1), adds a bias to every y: that point's column of ``A^T`` is all ones."""
    return bias * constant("int32", 9 * OUTPUT_SCALE, lanes)


def descale(value: Expr, lanes: int) -> Expr:
    """``64 y`` (``OUTPUT_SCALE``) of ``576 y`` modulo 2**32."""
    inverse = _INVERSE_OF_9 - 2**32 if _INVERSE_OF_9 >= 2**31 else _INVERSE_OF_9
    return value * constant("int32", inverse, lanes)
