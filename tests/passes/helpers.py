"""Shorthand for tests of passes: a function or module captured, and its operators by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphopt as go
from graphopt import ops
from tests.models import MODELS


class Calls(nn.Module):
    """A function of tensors (and of named submodules, tensors as buffers) as a module in evaluation mode."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(parts)
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def captured(
    function: Callable[..., Any], *inputs: Any, **parts: nn.Module | torch.Tensor
) -> go.Program:
    """The program of a function."""
    return go.capture(Calls(function, **parts), inputs)


@functools.cache
def network(name: str) -> go.Program:
    """One of ``tests.models``, captured once a process (no pass changes its input)."""
    return go.capture(*MODELS[name]())


def operators(program: go.Program) -> list[str]:
    """The operators in order, by the op table's names."""
    names = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            op = ops.info(node)
            names.append(op.name if op else str(node.target))
    return names


def rewrites(program: go.Program) -> int:
    """How many rewrites the last pass made."""
    count: int = program.history[-1].rewrites
    return count


def reasons(program: go.Program) -> list[str]:
    """Why the last pass declined."""
    return [reason for _, reason in program.history[-1].declines]
