"""The weights of a .gopt file: a malformed safetensors file is refused by what is wrong with it."""

from __future__ import annotations

import json

import pytest

from graphopt import weights_file


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "the header is longer than the file"),
        (b"\2\0\0\0\0\0\0\0[}", "the header is no JSON"),
        (b"\xff\0\0\0\0\0\0\0{}", "the header is longer than the file"),
        (b"\2\0\0\0\0\0\0\0[]", "the header is no JSON object"),
        (b"\2\0\0\0\0\0\0\0{}abc", "3 bytes belong to no tensor"),
    ],
)
def test_malformed_weights_are_refused(weights: bytes, message: str) -> None:
    with pytest.raises(weights_file.WeightsError) as caught:
        weights_file.decode(memoryview(weights))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        {"dtype": "U8", "shape": [10**18], "data_offsets": [0, 10**18]},
        {"dtype": "U8"},
        7,
    ],
)
def test_a_malformed_tensor_is_refused(entry: object) -> None:
    text = json.dumps({"w": entry}).encode()
    with pytest.raises(weights_file.WeightsError, match=r"^tensor 'w' "):
        weights_file.decode(memoryview(len(text).to_bytes(8, "little") + text + b"\0"))
