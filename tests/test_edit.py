"""``Edit``: the handle through which passes change a program."""

from __future__ import annotations

import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.edit import Edit


def test_argument_left_at_its_default_can_be_set() -> None:
    """A convolution without bias is called with two arguments; the third can be given."""
    program = go.capture(nn.Conv2d(2, 3, 1, bias=False), (torch.ones(1, 2, 4, 4),)).clone()
    edit = Edit(program, "test")
    (node,) = edit.nodes("conv2d")
    node.args = node.args[:2]
    bias = edit.build(node).parameter("bias", torch.arange(3.0))
    edit.replace_argument(node, "bias", bias)
    assert ops.bind(node)["bias"] is bias
    assert edit.rewrites == 1
