"""int8 weights of many zeros as the file holds them: a bit an element, ``w != 0``, and the bytes of those that are set.

Pruned weights whose kernel is dense (a linear layer of one image, say) would take as many bytes as before. A function in the
model's own library puts the zeros back when a session loads them; the kernels do not know.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import emit
from graphopt.backends.cpu.emit import bind

Array = np.ndarray[tuple[int, ...], np.dtype[np.int8]]

_BITS = 8
_SMALLEST = 4096  # elements; below it the function is larger than what it saves
_WORTH = 0.6  # of the bytes, above which weights are stored as they are


def is_worth(weight: Array) -> bool:
    """True where a flat array becomes so much smaller."""
    if weight.ndim != 1 or weight.size < _SMALLEST or weight.size % _BITS:
        return False
    return _packed_size(weight) < _WORTH * weight.size


def _packed_size(weight: Array) -> int:
    # one byte more: the function reads the next value before it knows whether there is one
    return weight.size // _BITS + int(np.count_nonzero(weight)) + 1


def pack(weight: Array) -> Array:
    """Masks, element i in bit ``i % 8`` of byte ``i // 8``, then the values in their order, then a zero."""
    masks = np.packbits(weight != 0, bitorder="little").view(np.int8)
    return np.concatenate([masks, weight[weight != 0], np.zeros(1, np.int8)])


def unpacker(size: int) -> tvm.tirx.PrimFunc:
    """The function ``(packed, weight)`` for weights of ``size`` elements, whatever their zeros."""
    masks = size // _BITS
    with emit.kernel(f"put_zeros_{size}") as builder:
        stored = tirx.Var("stored", "int64")
        packed = T.arg("packed", T.buffer((stored,), "int8"))
        result = T.arg("weight", T.buffer((size,), "int8"))
        place = T.alloc_buffer((1,), "int32")
        T.buffer_store(place, tirx.const(masks, "int32"), [0])
        with emit.loop(masks) as i:
            mask = bind(T.cast(packed[i], "int32"))
            for j in range(_BITS):
                bit = bind((mask >> j) & 1)
                value = T.cast(packed[place[0]], "int32") * bit
                T.buffer_store(result, T.cast(value, "int8"), [i * _BITS + j])
                T.buffer_store(place, place[0] + bit, [0])
    return builder.get()
