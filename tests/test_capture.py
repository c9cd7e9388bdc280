"""``go.capture``: inputs and outputs of any structure, dynamic batch, and errors that name the user's line."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.contract import difference
from graphopt.errors import CaptureError, InputError
from graphopt.verify import verify
from tests import zoo
from tests.models import MODELS, example
from tests.passes.helpers import Calls, captured, operators

X = example(2, 4, 6, 6)
FAST = [
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "resnet18"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "squeezenet1_1"),
    ("timm", "lcnet_050"),
]


@pytest.mark.parametrize("name", MODELS)
def test_small_networks_equal_eager(name: str) -> None:
    model, inputs = MODELS[name]()
    program = go.capture(model, inputs)
    verify(program)
    assert difference(model(*inputs), program(*inputs)) == 0.0


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(*entry, marks=() if entry in FAST else pytest.mark.slow, id="-".join(entry))
        for entry in zoo.names()
    ],
)
def test_architectures_equal_eager(library: str, name: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    model, inputs = zoo.build(library, name)
    program = go.capture(model, inputs)
    verify(program)
    with torch.no_grad():
        assert difference(model(*inputs), program(*inputs)) == 0.0


def test_parameters_keep_their_names_and_unread_buffers_go() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)).eval()
    names = set(go.capture(model, (X,)).graph_module.state_dict())
    assert names == set(model.state_dict()) - {"1.num_batches_tracked"}


def test_nested_inputs_and_outputs() -> None:
    def function(x: Tensor, more: dict[str, Any]) -> dict[str, Any]:
        return {"sum": x + more["a"], "rest": (more["b"][0] * 2, [x])}

    program = captured(function, X, {"a": X + 1, "b": [X - 1]})
    result = program(X, {"a": X, "b": [X]})
    assert torch.equal(result["sum"], X + X)
    assert torch.equal(result["rest"][0], X * 2)
    assert torch.equal(result["rest"][1][0], X)
    assert len(program.inputs) == 3


def test_one_tensor_may_stand_for_the_tuple() -> None:
    assert torch.equal(go.capture(nn.ReLU(), X)(X), X.relu())


def test_an_exported_program_brings_its_inputs() -> None:
    exported = torch.export.export(nn.ReLU(), (X,))
    assert torch.equal(go.capture(exported).example_inputs[0], X)


def test_dynamic_batch() -> None:
    model, inputs = MODELS["resnet"]()
    program = go.capture(model, (inputs[0][:1],), dynamic_batch=(1, 8))
    assert program.dynamic_batch == (1, 8)
    for batch in (1, 3, 8):
        x = example(batch, *inputs[0].shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-6)
    message = "^input 'x' must have a batch of 1 to 8, not 9$"
    with pytest.raises(InputError, match=message):
        program(example(9, *inputs[0].shape[1:]))


def test_dynamic_batch_of_several_inputs() -> None:
    program = go.capture(Calls(lambda x, y: x + y["k"]), (X, {"k": X}), dynamic_batch=(1, 4))
    x = example(3, 4, 6, 6)
    assert torch.equal(program(x, {"k": x}), x + x)


SPELLINGS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "same": (lambda x, w: F.conv2d(x, w, padding="same"), ["conv2d"]),
    "same-odd": (lambda x, w: F.conv2d(x, w[..., :2], padding="same"), ["slice", "pad", "conv2d"]),
    "valid": (lambda x, w: F.conv2d(x, w, padding="valid"), ["conv2d"]),
    "same-dilated": (lambda x, w: F.conv2d(x, w, padding="same", dilation=(1, 2)), ["conv2d"]),
    "multiply": (lambda x, w: torch.multiply(x, x), ["mul"]),
    "concatenate": (lambda x, w: torch.concatenate([x, x]), ["concat"]),
    "clip": (lambda x, w: torch.clip(x, 0, 1), ["clamp"]),
    "swapaxes": (lambda x, w: torch.swapaxes(x, 0, 1), ["transpose"]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling(name: str) -> None:
    function, expected = SPELLINGS[name]
    weight = example(3, 4, 3, 3)
    program = captured(function, X, w=weight)
    verify(program)
    assert operators(program) == expected
    assert difference(function(X, weight), program(X)) == 0.0


def test_casts_leave_no_assertions() -> None:
    assert operators(captured(lambda x: x.to(torch.float64), X)) == ["aten.to.dtype"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error names
            return x
        return -x


def test_a_branch_on_values_is_named_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        go.capture(Branches(), (X,))
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(
        i for i, text in enumerate(source, start=1) if text.strip().startswith("if x.sum()")
    )
    assert str(caught.value).startswith(
        f"Branches cannot be captured at {__file__}:{line}, in forward, "
    )
    assert str(caught.value).endswith(
        "the branch or size depends on tensor values: use torch.where or a fixed size"
    )


def test_a_model_that_fails_on_its_inputs() -> None:
    with pytest.raises(CaptureError, match=r"the model itself fails on example_inputs: check"):
        go.capture(nn.Linear(3, 4), (X,))
    with pytest.raises(CaptureError, match=r"the model itself fails on example_inputs: check"):
        go.capture(nn.ReLU(), (X, X))
    with pytest.raises(CaptureError, match=r"the model itself fails on example_inputs: check"):
        go.capture(nn.ReLU(), (X, X), dynamic_batch=(1, 4))


def test_a_fixed_batch_refuses_a_range() -> None:
    with pytest.raises(CaptureError, match=r"the model fixes the batch size: drop dynamic_batch"):
        go.capture(Calls(lambda x: x.view(2, -1)), (X,), dynamic_batch=(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "capture needs example_inputs: a tuple of the model's positional arguments"),
        (((X,), (4, 2)), "dynamic_batch must be (low, high) with 1 <= low < high, not (4, 2)"),
        (
            ((torch.tensor(1.0),), (1, 2)),
            "dynamic_batch needs inputs with a batch dimension; a scalar tensor was given",
        ),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CaptureError, match=f"^{re.escape(message)}$"):
        go.capture(nn.ReLU(), *arguments)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"must be a torch.Tensor; bind other values in the model"
    ):
        go.capture(Calls(lambda x, factor: x * factor), (X, 3))


def test_an_example_without_elements_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"^input 'input_1' has no elements; give an example"):
        go.capture(nn.ReLU(), torch.empty(0, 3))
