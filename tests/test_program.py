from __future__ import annotations

import re
from typing import Any

import pytest
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError
from tests.models import example
from tests.passes.helpers import Calls, captured, network

X = example(2, 4)


def test_clone_shares_tensors_and_not_the_graph() -> None:
    program = network("resnet")
    clone = program.clone()
    old, new = (p.graph_module.state_dict(keep_vars=True) for p in (program, clone))
    assert {name: id(t) for name, t in old.items()} == {name: id(t) for name, t in new.items()}
    assert not set(program.graph.nodes) & set(clone.graph.nodes)


def test_a_program_trains() -> None:
    program = captured(lambda x, layer: layer(x).sum(), X, layer=nn.Linear(4, 3))
    program(X).backward()
    weight = program.graph_module.get_parameter("layer.weight")
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_stats_count_macs_parameters_and_bytes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(32, 5))
    program = go.capture(model.eval(), (example(1, 3, 4, 4),))
    stats = program.stats()
    assert [layer.op for layer in stats.layers] == ["conv2d", "linear"]
    assert [layer.macs for layer in stats.layers] == [8 * 2 * 2 * 27, 32 * 5]
    assert stats.parameters == 8 * 27 + 8 + 32 * 5 + 5
    assert stats.bytes == 4 * stats.parameters
    assert stats.to_json()["layers"][1]["shape"] == (1, 5)


@pytest.mark.parametrize(
    ("conv", "shape", "macs"),
    [
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5), 2 * 8 * 9 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.Conv1d(4, 8, 3), (1, 4, 5), 8 * 3 * 12),
    ],
    ids=["grouped", "transposed", "conv1d"],
)
def test_macs_of_convolutions(conv: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert go.capture(conv, (example(*shape),)).stats().macs == macs


def test_a_parameter_of_two_layers_counts_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    program = captured(lambda x, layer: layer(layer(x)), X, layer=layer)
    assert program.stats().parameters == 16
    assert [row.parameters for row in program.stats().layers] == [16, 16]


def test_zeros_are_counted() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data[0] = 0
    assert go.capture(layer, (X,)).stats().nonzero == 12


PROGRAM_INPUTS = (X, {"a": X})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X,), "the program takes 2 input(s), 1 were given"),
        ((X, {"a": "text"}), "input 'inputs_1_a' must be a torch.Tensor, not str"),
        ((X.double(), {"a": X}), "input 'inputs_0' must be torch.float32, not torch.float64"),
        ((X[0], {"a": X}), "input 'inputs_0' must have 2 dimensions, not 1"),
        ((X, {"a": X[:, :3]}), "input 'inputs_1_a' must have size 4 in dimension 1, not 3"),
    ],
)
def test_wrong_inputs_are_named(inputs: tuple[Any, ...], message: str) -> None:
    program = captured(lambda x, more: x + more["a"], *PROGRAM_INPUTS)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        program(*inputs)


def test_another_nesting_is_refused() -> None:
    program = captured(lambda x, more: x + more["a"], *PROGRAM_INPUTS)
    with pytest.raises(InputError, match=r"^the inputs must be nested as "):
        program(X, {"b": X})


def test_inputs_of_two_batch_sizes_are_refused() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    program = go.capture(Add(), (X, X), dynamic_batch=(1, 8))
    with pytest.raises(InputError, match=r"^all inputs must have one batch size, not x 3, y 4$"):
        program(example(3, 4), example(4, 4))


def test_records_as_json() -> None:
    program = go.passes.RemoveIdentities()(captured(lambda x: x + 0, X))
    (record,) = program.history
    assert record.to_json() == {
        "pass": "remove-identities",
        "options": {"layout": False},
        "contract": "exact",
        "rewrites": 1,
        "declines": [],
        "parameters": [0, 0],
        "macs": [0, 0],
        "error": 0.0,
        "notes": [],
        "layers": [],
    }
    assert Calls(lambda x: x).training is False
