"""Patches times weights are the layer's output, whatever its geometry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt import ops
from graphopt.edit import Edit
from graphopt.passes.calibration import watch
from graphopt.passes.patches import patches, positions, sample_patches
from tests.passes.quantize.nets import capture


def layer_of(program):
    return next(n for n in program.graph.nodes if ops.is_op(n, "conv1d", "conv2d", "conv2d_same", "conv1d_same", "linear"))  # fmt: skip


def check(module, *shape):
    program = capture(lambda m, x: m.a(x), *shape, a=module)
    node = layer_of(program)
    (x,) = program.example_inputs
    seen: list[torch.Tensor] = []
    watch(Edit(program, "p"), [node], [x], lambda _, *values: seen.extend(values))
    given_to_layer, y = seen  # capture pads uneven margins before the layer
    rows = patches(node, given_to_layer, torch.arange(positions(node, y)))
    made = rows @ module.weight.detach().flatten(1).T + module.bias.detach()
    expected = y.movedim(1, -1).reshape(made.shape) if y.dim() > 2 else y
    # float32 sums of up to 200 products in another order
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_convolutions_of_any_geometry(kernel, stride, dilation, padding):
    check(nn.Conv2d(3, 5, kernel, stride, padding, dilation), 2, 3, 9, 8)


@pytest.mark.parametrize("kernel", [(3, 2), (4, 1), (2, 5)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(kernel, padding):
    check(nn.Conv2d(3, 5, kernel, padding=padding, dilation=(1, 2)), 2, 3, 9, 12)


def test_one_dimension_and_linear():
    check(nn.Conv1d(3, 5, 4, 2, 1), 2, 3, 11)
    check(nn.Linear(6, 4), 7, 6)


def test_a_sample_is_some_of_the_rows():
    program = capture(lambda m, x: m.a(x), 2, 3, 6, 6, a=nn.Conv2d(3, 5, 3, padding=1))
    node = layer_of(program)
    batches = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    sample = sample_patches(Edit(program, "p"), [node], batches, 40)[node]
    assert sample.shape == (40, 27)
    everything = torch.cat([patches(node, x, torch.arange(72)) for x in batches])
    assert all((everything == row).all(dim=1).any() for row in sample)
    assert sample_patches(Edit(program, "p"), [node], batches, 999)[node].shape == (216, 27)
