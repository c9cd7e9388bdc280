"""concat: channels side by side, copied or requantized, bit for bit on every row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.backends.cpu.concat import concat
from graphopt.backends.cpu.workload import Concat, Layout, Requantize
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, round_and_clamp, run

ROUNDING = Requantize(zero_point=7, qmin=0, qmax=255)


def check(workload: Concat, row, threads: int = 1, batch: int = 1) -> None:
    maps = [random_map(layout, i, batch) for i, layout in enumerate(workload.inputs)]
    parts = []
    for part, rescale in zip(maps, workload.requantize or (None,) * len(maps), strict=True):
        if rescale is None:
            parts.append(part)
            continue
        multiplier, zero_point, rounding = rescale
        scaled = (part.astype(np.int32) - zero_point).astype(np.float32) * np.float32(multiplier)
        parts.append(round_and_clamp(scaled, rounding).astype(part.dtype))
    expected = pack(workload.y, np.concatenate(parts, 1))
    arrays = [pack(layout, m) for layout, m in zip(workload.inputs, maps, strict=True)]
    actual = run(concat(workload, row, threads), row, *arrays, out=expected)
    np.testing.assert_array_equal(actual, expected)


def make(counts, dtype="uint8", batch=1, rescaled=()):
    inputs = tuple(Layout(batch, 3, 5, c, dtype, i, 0, 1, i) for i, c in enumerate(counts))
    y = Layout(batch, 3, 5, sum(counts), dtype, 1, 0, 2, 1, sum(counts) + 3, fill=7)
    factors = tuple((0.83, 40, ROUNDING) if i in rescaled else None for i in range(len(counts)))
    return Concat(inputs, y, factors if rescaled else ())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_copies_and_requantizes(row):
    check(make((64, 13, 130)), row)
    check(make((24, 3, 1), rescaled=(1,)), row)
    check(make((5, 16), "float32"), row)


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=4),
    st.sets(st.integers(0, 3)),
    st.sampled_from(ROWS),
)
@settings(max_examples=20, deadline=None)
@example([1, 1], {0, 1}, ROWS[-1])
def test_random_parts(counts, rescaled, row):
    check(make(tuple(counts), rescaled=rescaled), row)


def test_dynamic_batch_and_threads():
    for threads in (1, 2):
        check(make((24, 40), batch=None), ROWS[0], threads, batch=3)
    assert "T.parallel" in concat(make((24, 40)), ROWS[0], 2).script()


def test_declines_parts_that_do_not_fit():
    with pytest.raises(CompileError, match="does not make 40"):
        concat(Concat((Layout(1, 3, 5, 24, "uint8"),), Layout(1, 3, 5, 40, "uint8")), ROWS[0], 1)
    with pytest.raises(CompileError, match="differ in batch, height or width"):
        concat(Concat((Layout(1, 3, 4, 40, "uint8"),), Layout(1, 3, 5, 40, "uint8")), ROWS[0], 1)
