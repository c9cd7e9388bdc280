"""Products of 2 x 8 uint8 by 8 x 2 int8 (``usmmla``): sums of 2 pixels by 2 channels in a register of four.

Twice the multiply-accumulates of a dot product of lanes, for a shuffle a register of activations and one a vector of results.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Accumulators, Buffer, Expr, bind, load, load_channels
from graphopt.backends.cpu.isa import INT8_STEP

STEP = 8  # input channels
_BOTH = 2  # pixels of a block, and its channels


class Blocks(Accumulators):
    """A tile's sums in blocks ``[pixel][channel]`` of 2 x 2; an odd last pixel has a block whose second row means nothing."""

    def __init__(self, pixels: int, vectors: int) -> None:
        super().__init__(-(-pixels // _BOTH), _BOTH * vectors, "int32", _BOTH * _BOTH)

    def begin(self, vector: int, value: Expr) -> None:
        """Put ``value`` into the channel vector of every pixel."""
        for half in range(_BOTH):
            channels = [2 * half, 2 * half + 1]
            start = bind(tirx.Shuffle([value], [*channels, *channels]))
            for pair in range(self._rows):
                self.set(pair, _BOTH * vector + half, start)

    def vector(self, pixel: int, vector: int) -> Expr:
        """A pixel's sums of a channel vector: its rows of two blocks."""
        pair, row = divmod(pixel, _BOTH)
        blocks = [self.get(pair, _BOTH * vector + half) for half in range(_BOTH)]
        return tirx.Shuffle(blocks, [2 * row, 2 * row + 1, 4 + 2 * row, 5 + 2 * row])


def pair_of_loaded(loaded: Sequence[Expr], step: int) -> Expr:
    """The left operand of step 0 or 1 of two pixels' ``emit.load_steps``; of one pixel alone the second row means nothing."""
    halves = [bind(T.reinterpret("int64x2", value)) for value in loaded]
    order = [step, 2 + step] if len(halves) == _BOTH else [step, 1]
    return bind(T.reinterpret("int8x16", tirx.Shuffle(halves, order)))


def pair_of_steps(buffer: Buffer, starts: Sequence[Expr], valid: int) -> Expr:
    """The left operand of one step of two pixels, or of one; only the first ``valid`` channels are read, the others are 0."""
    if valid == STEP:
        words = [bind(T.reinterpret("int32x2", load(buffer, start, STEP))) for start in starts]
        order = [0, 1, 2, 3] if len(words) == _BOTH else [0, 1, 0, 1]
        return bind(T.reinterpret("int8x16", tirx.Shuffle([words[0], words[-1]], order)))
    words = [bind(_word(buffer, start, valid)) for start in (starts[0], starts[-1])]
    return bind(T.reinterpret("int8x16", tirx.Shuffle(words, [0, 1])))


def _word(buffer: Buffer, index: Expr, valid: int) -> Expr:
    """Fewer than 8 channels as the bytes of an int64."""

    def half(first: int, size: int) -> Expr:
        word = load_channels(buffer, index + first, size)
        return T.cast(T.reinterpret("uint32", word), "int64")

    low = half(0, min(valid, INT8_STEP))
    if valid <= INT8_STEP:
        return low
    return low | half(INT8_STEP, valid - INT8_STEP) << tirx.const(32, "int64")
