"""The straight line of calls as JSON, and what is refused of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from graphopt import straight_line
from graphopt.straight_line import Call, StraightLine, Tensor

LINE = StraightLine(
    storages=(256, 64),
    results=(40,),
    tensors=(
        Tensor("input", 0, 0, "uint8", (1, 3)),
        Tensor("weight", 2, 0, "int8", ()),
        Tensor("storage", 0, 64, "float32", (48,)),
        Tensor("result", 0, 0, "float32", (1, 10)),
    ),
    calls=(Call("relayout", (0, 2)), Call("linear_1", (2, 1, 3))),
    outputs=(3, 0),
    workspace=128,
)


def test_a_line_comes_back_from_json():
    assert straight_line.from_json(LINE.to_json()) == LINE
    refused = StraightLine(refused="operator 'sort' is TVM's")
    assert straight_line.from_json(refused.to_json()) == refused


def test_a_tensor_and_a_call_are_a_line_of_text_each():
    body = LINE.to_json()
    assert body["tensors"][2] == "storage 0+64 float32 [48]"
    assert body["tensors"][1] == "weight 2+0 int8 []"
    assert body["calls"] == ["relayout 0 2", "linear_1 2 1 3"]


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("tensors", ["heap 0+0 uint8 [1]"], "'heap 0+0 uint8 [1]' is no tensor"),
        ("tensors", ["input 0+0 uint9 [1]"], "'input 0+0 uint9 [1]' is of no known dtype"),
        ("calls", ["system();x 0"], "'system();x' is no name of a function"),
        ("calls", ["relayout 4"], "a call or an output names a tensor that is not there"),
        ("outputs", [-1], "a call or an output names a tensor that is not there"),
        ("tensors", ["input 0+0 bfloat16 [1]"], "'input 0+0 bfloat16 [1]' is of no known dtype"),
        ("workspace", -1, "a size is negative"),
        ("workspace", float("inf"), "inf is no whole number"),
        ("storages", [256, "64"], "'64' is no whole number"),
        (
            "storages",
            [255, 64],
            "tensor 'storage 0+64 float32 [48]' is not inside of its memory",
        ),
        ("results", [], "tensor 'result 0+0 float32 [1, 10]' is not inside of its memory"),
    ],
)
def test_what_is_not_one_is_refused(member: str, value: Any, message: str):
    body = LINE.to_json()
    body[member] = value
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        straight_line.from_json(body)
