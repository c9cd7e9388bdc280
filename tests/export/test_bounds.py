"""A line of calls that names bytes of others is refused before C code is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphopt.artifact import Artifact
from graphopt.errors import ArtifactError
from graphopt.export.layout import lay_out
from graphopt.manifest import Dim, TensorSpec, WeightTransform
from graphopt.straight_line import Call, StraightLine, Tensor
from tests import compiled

_ROWS = 3
_X = Tensor("input", 0, 0, "float32", (_ROWS, compiled.FEATURES))
_Y = Tensor("result", 0, 0, "float32", (_ROWS, compiled.OUTPUTS))
_WEIGHTS = [
    Tensor("weight", i, 0, weight.dtype.name, weight.shape)
    for i, weight in enumerate(compiled.weights().values())
]
_BYTES = compiled.weights()["fc.weight"].nbytes


def _artifact(line: StraightLine, **changes: Any) -> Artifact:
    manifest = compiled.manifest(batch=_ROWS, line=line, **changes)
    return Artifact(manifest, b"", compiled.weights())


def _line(*tensors: Tensor, outputs: tuple[int, ...] = (1,)) -> StraightLine:
    everything = (_X, _Y, *tensors)
    calls = (Call("kernel", tuple(range(len(everything)))),)
    return StraightLine((), (_Y.bytes,), everything, calls, outputs)


_ONE: dict[str, Any] = {
    "outputs": (TensorSpec("y", "float32", _Y.shape),),
    "output_structure": 0,
}


def test_what_is_inside_is_laid_out() -> None:
    half = dataclasses.replace(_WEIGHTS[0], offset=_BYTES // 2, shape=(_BYTES // 8,))
    layout = lay_out(_artifact(_line(*_WEIGHTS, half), **_ONE))
    assert [tensor.offset for tensor in layout.tensors[-1:]] == [_BYTES // 2]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (
            dataclasses.replace(_WEIGHTS[0], offset=4),
            f"is not inside of the {_BYTES} bytes of weight 'fc.weight'",
        ),
        (
            dataclasses.replace(_X, shape=(_ROWS + 1, compiled.FEATURES)),
            f"is not inside of the {_X.bytes} bytes of input 'x'",
        ),
        (
            dataclasses.replace(_WEIGHTS[0], shape=(2**40, 2**40)),
            f"is not inside of the {_BYTES} bytes of weight 'fc.weight'",
        ),
    ],
    ids=["weight", "input", "huge"],
)
def test_what_is_outside_is_refused(tensor: Tensor, reason: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        lay_out(_artifact(_line(tensor), **_ONE))
    assert str(caught.value) == (
        f"the model's line of calls is malformed: tensor {str(tensor)!r} {reason}; compile the model again"
    )


def test_one_image_of_a_batch_is_what_a_run_takes() -> None:
    dynamic = {
        "inputs": (TensorSpec("x", "float32", (Dim("n", 1, 8), compiled.FEATURES)),),
        "outputs": (TensorSpec("y", "float32", (Dim("n", 1, 8), compiled.OUTPUTS)),),
        "output_structure": 0,
        "image_by_image": True,
    }
    one = [dataclasses.replace(t, shape=(1, *t.shape[1:])) for t in (_X, _Y)]
    line = StraightLine((), (one[1].bytes,), tuple(one), (), (1,))
    assert lay_out(_artifact(line, **dynamic)).batch == (1, 8)
    with pytest.raises(ArtifactError, match="is not inside of the"):
        lay_out(_artifact(_line(), **dynamic))


@pytest.mark.parametrize(
    ("changes", "outputs", "reason"),
    [
        (_ONE, (1, 1), "it gives 2 outputs of 1"),
        (_ONE, (0,), f"output 'y' is of {_Y.bytes} bytes and its tensor of {_X.bytes}"),
        (
            {
                **_ONE,
                "weight_transforms": (WeightTransform("v", "f", TensorSpec("v", "float32", (2,))),),
            },
            (1,),
            "the weight transform of 'v' is of no weight",
        ),
    ],
    ids=["outputs", "size", "transform"],
)
def test_outputs_and_transforms_are_those_of_the_network(
    changes: dict[str, Any], outputs: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        lay_out(_artifact(_line(outputs=outputs), **changes))
    assert str(caught.value) == (
        f"the model's line of calls is malformed: {reason}; compile the model again"
    )
