from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx, nn

import graphopt as go
from graphopt.edit import Build
from graphopt.errors import ContractError, PassError, VerifyError
from graphopt.passing import Pass, RewritePass
from graphopt.pattern import Call, Match, Operators
from graphopt.rule import RewriteRule
from tests.models import example
from tests.passes.helpers import captured, operators, reasons, rewrites

X = example(2, 4)


@dataclass(frozen=True)
class Custom(Pass):
    """Applies a function, under any contract; not registered."""

    name = "custom"
    contract = go.lossy

    function: Any = None
    promise: go.Contract = go.lossy

    def promised(self) -> go.Contract:
        return self.promise

    def apply(self, edit: go.Edit) -> None:
        self.function(edit)


class ReluToSigmoid(RewriteRule):
    def pattern(self, op: Operators) -> Call:
        return op.relu(go.var("x"))

    def check(self, match: Match) -> None:
        if match["x"].op != "placeholder":
            match.decline(f"{match['x'].name} is computed")

    def rewrite(self, build: Build, match: Match) -> fx.Node:
        return build.sigmoid(match["x"])


class Forever(ReluToSigmoid):
    def rewrite(self, build: Build, match: Match) -> fx.Node:
        return build.relu(match["x"])


class Nothing(ReluToSigmoid):
    def rewrite(self, build: Build, match: Match) -> fx.Node:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class Rewriting(RewritePass):
    name = "rewriting"
    contract = go.lossy

    rule: Any = field(default_factory=ReluToSigmoid)

    def active_rules(self) -> tuple[RewriteRule, ...]:
        return (self.rule,)


def relu_relu() -> go.Program:
    return captured(lambda x: torch.relu(torch.relu(x)), X)


def test_rewrites_and_declines_are_counted() -> None:
    result = Rewriting()(relu_relu())
    assert operators(result) == ["sigmoid", "relu"]
    assert rewrites(result) == 1
    assert reasons(result) == ["sigmoid is computed"]
    assert result.history[0].error is not None
    assert result.history[0].error > 0


def test_new_nodes_keep_the_provenance_of_the_old() -> None:
    result = Rewriting()(relu_relu())
    (sigmoid,) = go.Edit(result, "test").nodes("sigmoid")
    assert sigmoid.meta["provenance"] == ("relu",)


def test_a_rule_without_end_is_named() -> None:
    message = (
        r"^rewriting reaches no fixed point: Forever at node 'relu(_\d+)?' still rewrites after 32 sweeps; "
        "let its check decline what it has already rewritten$"
    )
    with pytest.raises(PassError, match=message):
        Rewriting(Forever())(captured(torch.relu, X))


def test_a_rule_that_returns_no_node_is_named() -> None:
    with pytest.raises(
        PassError, match=r"^rewriting: Nothing.rewrite must return a node, not NoneType$"
    ):
        Rewriting(Nothing())(captured(torch.relu, X))


def test_a_broken_promise_is_an_error() -> None:
    def shift(edit: go.Edit) -> None:
        (node,) = edit.nodes("relu")
        new = edit.build(edit.program.output).add(node, 0.5)
        edit.replace(node, new)

    program = captured(torch.relu, X)
    assert rewrites(Custom(shift)(program)) == 1
    with pytest.raises(
        ContractError,
        match=r"^custom promises within\(1e-05\) but changed the output by 0.\d+ on the example inputs$",
    ):
        Custom(shift, go.within(1e-5))(program)


def test_replacing_a_value_by_a_chain_that_reads_it() -> None:
    def wrap(edit: go.Edit) -> None:
        (node,) = edit.nodes("relu")
        build = edit.build(edit.program.output)
        edit.replace(node, build.mul(build.add(node, 1), build.sigmoid(node)))

    result = Custom(wrap)(captured(torch.relu, X))
    assert operators(result) == ["relu", "add", "sigmoid", "mul"]
    y = X.relu()
    assert torch.equal(result(X), (y + 1) * y.sigmoid())


def test_a_failing_pass_is_named() -> None:
    def fail(edit: go.Edit) -> None:
        raise KeyError("weight")

    with pytest.raises(PassError, match=r"^custom failed: KeyError: 'weight'$"):
        Custom(fail)(relu_relu())


def test_a_changed_output_shape_is_an_error() -> None:
    def flatten(edit: go.Edit) -> None:
        (node,) = edit.nodes("relu")
        edit.replace(node, edit.build(edit.program.output).reshape(node, [8]))

    message = r"^custom: output 0 \('reshape'\) was float32\[2, 4\] and is now float32\[8\]\n"
    with pytest.raises(VerifyError, match=message):
        Custom(flatten)(captured(torch.relu, X))


def test_a_node_made_behind_the_drivers_back_is_named() -> None:
    def smuggle(edit: go.Edit) -> None:
        (node,) = edit.nodes("relu")
        with edit.graph.inserting_after(node):
            new = edit.graph.call_function(torch.ops.aten.sigmoid.default, (node,))
        edit.replace(node, new)

    with pytest.raises(VerifyError) as caught:
        Custom(smuggle)(captured(torch.relu, X))
    assert (
        str(caught.value)
        == "custom: node 'sigmoid_default' has lost its provenance; make nodes with edit.build"
    )
    assert "torch.ops.aten.sigmoid.default" in caught.value.__notes__[0]


def test_dead_nodes_and_parameters_go() -> None:
    def cut(edit: go.Edit) -> None:
        (node,) = edit.nodes("linear")
        edit.replace(node, node.all_input_nodes[0])

    result = Custom(cut)(captured(lambda x, layer: layer(x), X, layer=nn.Linear(4, 4)))
    assert operators(result) == []
    assert not result.graph_module.state_dict()
    assert result.history[0].parameters == (20, 0)
    assert result.history[0].macs == (32, 0)


def test_set_tensor_leaves_the_input_program_alone() -> None:
    def double(edit: go.Edit) -> None:
        (node,) = edit.nodes("linear")
        weight = go.ops.bind(node)["weight"]
        edit.set_tensor(weight, edit.program.tensor(weight) * 2)

    program = captured(lambda x, layer: layer(x), X, layer=nn.Linear(4, 4, bias=False))
    result = Custom(double)(program)
    with torch.no_grad():
        assert torch.equal(result(X), program(X) * 2)
    assert isinstance(result.graph_module.get_parameter("layer.weight"), nn.Parameter)


def test_a_program_in_training_mode_is_not_measured() -> None:
    program = go.capture(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).train(), (X,))
    result = Rewriting()(program)
    assert result.history[0].error is None
    assert result.history[0].rewrites == 1


def test_what_became_of_each_layer_is_recorded() -> None:
    def double(edit: go.Edit) -> None:
        (node,) = edit.nodes("linear")
        weight = go.ops.bind(node)["weight"]
        edit.set_tensor(weight, edit.program.tensor(weight) * 2)
        edit.layer_changed(node, (16, 16), (64, 64), 1.0, "twice")

    program = captured(lambda x, layer: layer(x), X, layer=nn.Linear(4, 4, bias=False))
    record = Custom(double)(program).history[0]
    (change,) = record.layers
    assert (change.node, change.layer, change.text) == ("linear", "layer", "twice")
    assert record.to_json()["layers"] == [
        {
            "node": "linear",
            "layer": "layer",
            "parameters": [16, 16],
            "macs": [64, 64],
            "error": 1.0,
            "text": "twice",
        }
    ]
