"""Tiles in shared memory: no two rows that are read together, and no two chunks written together, share a bank."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import tirx

from graphopt.backends.cuda.shared_tile import CHUNK, SharedTile

_LINE = 128


def _offset(tile: SharedTile, row: int, column: int) -> int:
    place: Any = tile.offset(tirx.const(row, "int32"), tirx.const(column, "int32"))
    return int(place)


def _tile(width: int) -> SharedTile:
    return SharedTile(None, 0, 32, width, 3)


@pytest.mark.parametrize("width", [64, 128])
def test_ldmatrix_reads_every_bank_once(width: int) -> None:
    """Eight rows' chunks of 16 bytes, one row after another, are the 128 bytes that the banks give in a cycle."""
    tile = _tile(width)
    for first in range(0, 32, 8):
        for column in range(0, width, CHUNK):
            places = {_offset(tile, first + i, column) % _LINE // CHUNK for i in range(8)}
            assert len(places) == 8


@pytest.mark.parametrize("width", [64, 128])
def test_copies_fill_whole_lines(width: int) -> None:
    """Eight threads that copy neighbouring chunks of rows write one line."""
    tile = _tile(width)
    chunks = [(row, column) for row in range(32) for column in range(0, width, CHUNK)]
    for first in range(0, len(chunks), 8):
        lines = {_offset(tile, *chunk) // _LINE for chunk in chunks[first : first + 8]}
        assert len(lines) == 1


@pytest.mark.parametrize("width", [16, 64, 128])
def test_a_tile_holds_every_byte_once(width: int) -> None:
    tile = _tile(width)
    places = {_offset(tile, row, column) for row in range(32) for column in range(width)}
    assert places == set(range(32 * width))


def test_rows_sixteen_apart_lie_alike() -> None:
    """What fragments and windows add to their first row's place."""
    tile = _tile(64)
    for row in range(16):
        for column in range(0, 64, CHUNK):
            assert _offset(tile, row + 16, column) == _offset(tile, row, column) + 16 * 64
