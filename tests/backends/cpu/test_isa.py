"""ISA rows: the target each compiles for and the features each asks of a CPU."""

from __future__ import annotations

import pytest

from graphopt.backends.x86.isa import ISAS


@pytest.mark.parametrize("row", ISAS.values(), ids=lambda row: row.name)
def test_rows(row) -> None:
    assert ISAS[row.name] is row
    target = row.target()
    assert target.kind.name == "llvm"
    assert target.attrs["mcpu"] == row.mcpu
    assert row.missing(frozenset(row.features)) == ()
    assert row.missing(frozenset(row.features[1:])) == row.features[:1]
    assert row.vector_bytes == 4 * row.lanes
    assert row.halves * row.dot_group == 4


def test_wider_rows_ask_for_more() -> None:
    needs = {name: set(row.features) for name, row in ISAS.items()}
    assert needs["sse4"] < needs["avx2"] < needs["avx512"] < needs["avx512-vnni"]
    assert needs["avx2"] < needs["avx-vnni"]
