"""The one-dimensional transforms of Winograd's F(4, 3): ``y = A^T ((G w) * (B^T d))``, 6 products for 4 outputs of 3 taps.

Points 0, 1, -1, 2, -2 and infinity (Winograd 1980; Lavin & Gray 2016). On integers everything is exact modulo 2**32:
``G`` is scaled by 24 (its last row by 12, which ``A^T`` doubles), so that a tile comes out 576 times too large; 576 is
64 * 9, and 9 has an inverse modulo 2**32. What is left after a product with it is 64 y, a number that int32 holds as long
as ``-2**25 <= y < 2**25``, and whose float32 is 64 times that of y.
Ranges: of bytes ``B^T d B`` stays within 12,750, of int8 weights ``G w G^T`` within 144 * 128 = 18,432: both are int16.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.cpu.emit import Expr, bind, constant

TILE = 4  # outputs a side
WINDOW = 6  # inputs a side
POINTS = WINDOW * WINDOW
LARGEST_SUM = 2**25 - 1
OUTPUT_SCALE = 64
BIAS_POINT = 1  # row and column of the point whose product reaches every output with weight 1
_INVERSE_OF_9 = pow(9, -1, 2**32)
_FLOAT_SCALES = (1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 1.0)
_INTEGER_SCALES = (6, -4, -4, 1, 1, 12)


def _scaled(value: Expr, factor: float) -> Expr:
    dtype = value.ty.dtype
    element = str(dtype).split("x")[0]
    return value if factor == 1 else value * constant(element, factor, dtype.lanes)


def transform_input(d: Sequence[Expr]) -> list[Expr]:
    """``B^T d`` of 6 values."""
    e = bind(d[4] - d[2])
    f = bind(d[3] - d[1])
    f2 = bind(f + f)
    p = bind(d[4] - _scaled(d[2], 4))
    q = bind(d[3] - _scaled(d[1], 4))
    return [
        bind(_scaled(d[0] - d[2], 4) + e),
        bind(p + q),
        bind(p - q),
        bind(e + f2),
        bind(e - f2),
        bind((d[5] - d[3]) - (f2 + f2)),
    ]


def transform_weights(w: Sequence[Expr], integer: bool) -> list[Expr]:
    """``G w`` of 3 values; integers scaled, see above."""
    even = bind(w[0] + w[2])
    far = bind(w[0] + _scaled(w[2], 4))
    near = bind(w[1] + w[1])
    rows = [w[0], even + w[1], even - w[1], far + near, far - near, w[2]]
    scales = _INTEGER_SCALES if integer else _FLOAT_SCALES
    return [bind(_scaled(row, scale)) for row, scale in zip(rows, scales, strict=True)]


def transform_output(m: Sequence[Expr], integer: bool) -> list[Expr]:
    """``A^T m`` of 6 values."""
    a, b = bind(m[1] + m[2]), bind(m[1] - m[2])
    c, d = bind(m[3] + m[4]), bind(m[3] - m[4])
    d2 = bind(d + d)
    last = m[5] + m[5] if integer else m[5]
    return [
        bind(m[0] + a + c),
        bind(b + d2),
        bind(a + _scaled(c, 4)),
        bind(b + _scaled(d2, 4) + last),
    ]


def scaled_bias(bias: Expr, lanes: int) -> Expr:
    """What, added to the product at point (1, 1), adds a bias to every y: that point's column of ``A^T`` is all ones."""
    return bias * constant("int32", 9 * OUTPUT_SCALE, lanes)


def descale(value: Expr, lanes: int) -> Expr:
    """``64 y`` (``OUTPUT_SCALE``) of ``576 y`` modulo 2**32."""
    inverse = _INVERSE_OF_9 - 2**32 if _INVERSE_OF_9 >= 2**31 else _INVERSE_OF_9
    return value * constant("int32", inverse, lanes)
