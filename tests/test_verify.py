from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import graphopt as go
from graphopt.errors import VerifyError
from graphopt.verify import check_same_interface, verify
from tests.models import MODELS, example
from tests.passes.helpers import captured, network

X = example(2, 4)


def broken(damage: Callable[[go.Program, fx.Node], object]) -> go.Program:
    program = captured(lambda x, w: torch.relu(x) * w, X, w=example(4)).clone()
    (node,) = go.Edit(program, "test").nodes("relu")
    damage(program, node)
    return program


def drop_shape(program: go.Program, node: fx.Node) -> None:
    del node.meta["val"]


def drop_provenance(program: go.Program, node: fx.Node) -> None:
    del node.meta["provenance"]


def wrong_shape(program: go.Program, node: fx.Node) -> None:
    node.meta["val"] = node.meta["val"][0]


def wrong_type(program: go.Program, node: fx.Node) -> None:
    node.meta["val"] = node.meta["val"].double()


def missing_tensor(program: go.Program, node: fx.Node) -> None:
    del program.graph_module.w


def unread_tensor(program: go.Program, node: fx.Node) -> None:
    program.graph_module.register_buffer("extra", torch.ones(1))


def wrong_arguments(program: go.Program, node: fx.Node) -> None:
    node.target = torch.ops.aten.mm.default
    node.args = (node.args[0], node.args[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shape, "node 'relu' has lost its shape; make nodes with edit.build"),
        (drop_provenance, "node 'relu' has lost its provenance; make nodes with edit.build"),
        (wrong_shape, "node 'relu' is recorded as float32[4] but computes float32[2, 4]"),
        (wrong_type, "node 'relu' is recorded as float64[2, 4] but computes float32[2, 4]"),
        (missing_tensor, "node 'w' reads 'w', which the program does not hold"),
        (unread_tensor, "parameter 'extra' is read by no node"),
        (wrong_arguments, "node 'relu' (aten.mm.default) does not accept its arguments: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(damage: Callable[[go.Program, fx.Node], object], message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(broken(damage))
    assert str(caught.value).startswith(message)


def test_a_read_before_its_definition_is_found() -> None:
    def reorder(program: go.Program, node: fx.Node) -> None:
        program.output.prepend(node)

    with pytest.raises(VerifyError, match=r"^the graph is not well formed: "):
        verify(broken(reorder))


@pytest.mark.parametrize("name", MODELS)
def test_captured_networks_are_well_formed(name: str) -> None:
    verify(network(name))


def test_interfaces_are_compared() -> None:
    one, two = captured(torch.relu, X), captured(torch.relu, X.double())
    check_same_interface(one, one)
    with pytest.raises(
        VerifyError, match=r"^input 0 .* was float32\[2, 4\] and is now float64\[2, 4\]$"
    ):
        check_same_interface(one, two)
    pair = captured(lambda x: (x.relu(), x), X)
    with pytest.raises(VerifyError, match=r"^the program had 2 output\(s\) and now has 1$"):
        check_same_interface(pair, one)


def test_dynamic_batches_verify() -> None:
    verify(go.capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (X,), dynamic_batch=(1, 8)))
