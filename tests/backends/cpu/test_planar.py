"""Changes between NHWC and planar order move every element, margins and pad channels included."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.planar import planar, reorder
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.x86.isa import ISAS
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, run
from tests.backends.cpu.test_sparse import from_planar, to_planar

LAYOUTS = {
    "64 channels": Layout(1, 7, 7, 64, "uint8"),
    "margins, batch of 2": Layout(2, 9, 13, 20, "uint8", 1, 2, 3, 1, fill=9),
    "pad channels": Layout(1, 5, 33, 6, "uint8", 1, 1, 1, 1, channel_stride=8, fill=5),
    "three channels": Layout(3, 4, 4, 3, "uint8", channel_stride=4, fill=7),
    "floats": Layout(1, 6, 19, 21, "float32", 1, 1, 1, 1),
    "two planes of floats": Layout(2, 3, 5, 2, "float32"),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(row: Isa, name: str) -> None:
    layout = LAYOUTS[name]
    other, logical = planar(layout), random_map(layout, seed=1)
    physical, planes = pack(layout, logical), to_planar(planar(layout), logical)
    made = run(reorder(layout, other, row, 1), row, physical, out=planes)
    np.testing.assert_array_equal(from_planar(other, made), logical)
    back = run(reorder(other, layout, row, 2), row, planes, out=physical)
    np.testing.assert_array_equal(back, physical)


def test_a_slice_of_a_wider_tensor_leaves_the_rest_alone() -> None:
    row = ROWS[0]
    layout = Layout(1, 8, 8, 16, "uint8", channel_stride=48, first_channel=16, shared=True)
    logical = random_map(layout, seed=2)
    out = np.zeros((1, 8, 8, 48), np.uint8)
    made = run(
        reorder(planar(layout), layout, row, 1), row, to_planar(planar(layout), logical), out=out
    )
    np.testing.assert_array_equal(made[..., 16:32], logical.transpose(0, 2, 3, 1))
    noise = np.random.default_rng(99).integers(0, 256, out.nbytes).astype(np.uint8)
    rest = [*range(16), *range(32, 48)]
    np.testing.assert_array_equal(made[..., rest], noise.reshape(out.shape)[..., rest])


def test_bytes_that_are_no_whole_words() -> None:
    layout = Layout(1, 4, 4, 6, "uint8")
    with pytest.raises(
        CompileError, match=r"reorder takes whole words of channels, not Layout\(.*; pad"
    ):
        reorder(layout, planar(layout), ISAS["avx2"], 1)
