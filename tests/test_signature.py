"""What a session takes and gives, written down when a model is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import CompileError
from graphopt.signature import input_specs, output_specs


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


@pytest.mark.parametrize("target", ["native", "sm_80"])
def test_it_is_checked_before_the_work(target: str, monkeypatch: pytest.MonkeyPatch):
    def work(*_: Any) -> None:
        raise AssertionError("work is done for a program that cannot be stored")

    monkeypatch.setattr("graphopt.compiler._Compiler.run", work)
    monkeypatch.setattr("graphopt.compiler._for_gpu", work)
    program = go.capture(Half(), (torch.zeros(2),))
    with pytest.raises(
        CompileError, match=r"^output '\w+' is bfloat16, which NumPy has no type for"
    ):
        go.compile(program, target)


def test_a_tensor_that_no_array_can_be_is_refused_by_name():
    program = go.capture(Half(), (torch.zeros(2),))
    (output,) = program.output.all_input_nodes
    with pytest.raises(CompileError) as caught:
        output_specs(program)
    assert str(caught.value) == (
        f"output {output.name!r} is bfloat16, which NumPy has no type for; convert it in the model, with .float() say"
    )
    program = go.capture(nn.Identity(), (torch.zeros(2, dtype=torch.bfloat16),))
    with pytest.raises(CompileError, match=r"^input '\w+' is bfloat16, which"):
        input_specs(program, frozenset())
