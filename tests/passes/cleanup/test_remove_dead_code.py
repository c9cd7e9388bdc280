from __future__ import annotations

import torch
from torch import nn

import graphopt as go
from tests.models import MODELS, example
from tests.passes.helpers import captured, network, operators, rewrites

X = example(2, 4)


def with_dead_node() -> go.Program:
    """``relu(x) + w``, and an unread ``sigmoid(x) * v``."""
    program = captured(lambda x, w: torch.relu(x) + w, X, w=nn.Parameter(example(4))).clone()
    edit = go.Edit(program, "test")
    build = edit.build(program.output)
    extra = build.parameter("v", torch.ones(4))
    build.mul(build.sigmoid(program.inputs[0]), extra)
    program.graph_module.recompile()
    return program


def test_unread_calls_and_parameters_go() -> None:
    program = with_dead_node()
    result = go.passes.RemoveDeadCode()(program)
    assert operators(program) == ["relu", "add", "sigmoid", "mul"]
    assert operators(result) == ["relu", "add"]
    assert list(dict(result.graph_module.named_parameters())) == ["w"]
    assert rewrites(result) == 3  # sigmoid, mul and the read of v


def test_two_reads_of_one_parameter_become_one() -> None:
    program = captured(lambda x, w: x * w, X, w=nn.Parameter(example(4))).clone()
    (multiply,) = go.Edit(program, "test").nodes("mul")
    with program.graph.inserting_before(program.inputs[0]):
        second = program.graph.get_attr("w")
    second.meta = dict(multiply.all_input_nodes[1].meta)
    build = go.Edit(program, "test").build(program.output)
    product = build.mul(multiply, second)
    program.output.replace_input_with(multiply, product)
    program.graph_module.recompile()
    result = go.passes.RemoveDeadCode()(program)
    reads = [node for node in result.graph.nodes if node.op == "get_attr"]
    assert len(reads) == 1
    assert rewrites(result) == 1


def test_unread_dropout_goes_though_it_is_random() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.dropout(x, 0.5, True)
        return x + 1

    assert operators(captured(function, X)) == ["add"]


def test_live_program_is_left_alone() -> None:
    for name in MODELS:
        program = network(name)
        result = go.passes.RemoveDeadCode()(program)
        assert rewrites(result) == 0
        assert operators(result) == operators(program)


def test_second_run_rewrites_nothing() -> None:
    result = go.passes.RemoveDeadCode()(go.passes.RemoveDeadCode()(with_dead_node()))
    assert rewrites(result) == 0
