"""Rounding by a sum: every half is rounded to even, as ``rint`` does."""

from __future__ import annotations

import struct

import numpy as np
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr
from graphopt.backends.cpu.stream import Argument
from graphopt.backends.cuda import device
from graphopt.backends.cuda.memory import build
from tests.backends.cuda.simt import run


def test_halves_and_their_neighbours() -> None:
    halves = np.arange(-1024, 1024, dtype=np.float32) / 2
    below, above = np.nextafter(halves, -np.inf), np.nextafter(halves, np.inf)
    largest = np.array([2.0**22 - 0.5, -(2.0**22) + 0.5, -0.0, 1e-40], np.float32)
    x = np.concatenate([halves, below, above, largest]).astype(np.float32)
    count = len(x)

    def emit(_: Expr, flats: list[Buffer]) -> None:
        with T.launch_thread("blockIdx.x", count) as block, T.launch_thread("threadIdx.x", 1):
            T.buffer_store(flats[1], device.round_to_int(flats[0][block]), [block])

    arguments = [Argument("x", (count,), "float32"), Argument("y", (count,), "int32")]
    y = np.zeros(count, np.int32)
    run(build("kernel", arguments, emit), x, y)
    assert (y == np.rint(x.astype(np.float64))).all()


def test_the_number_that_is_added() -> None:
    assert struct.unpack("<i", struct.pack("<f", device._SHIFT)) == (device._SHIFT_BITS,)
