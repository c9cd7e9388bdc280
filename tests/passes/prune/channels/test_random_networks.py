"""On random networks, the masked and the shrunk network are one function, with the same gradients and the predicted cost."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt import ops
from graphopt.contract import difference
from graphopt.passes.prune import channels
from graphopt.passes.prune.channels.labels import Axis
from tests.passes.prune.channels.helpers import Choice, cut, draw, masked, shrunk
from tests.passes.prune.channels.random_networks import random_network

# float64: 1e-16 a rounding, sums of at most a few thousand terms of size 1 in another order, some twenty layers deep
TOLERANCE = 1e-10

WANTED = (
    "conv2d", "conv_transpose2d", "linear", "matmul", "einsum", "scaled_dot_product_attention", "batch_norm",
    "instance_norm", "group_norm", "add", "mul", "sigmoid", "relu", "prelu", "glu", "cat", "stack", "split_with_sizes", "reshape",
    "permute", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "max_pool2d", "mean",
)  # fmt: skip


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_masked_and_shrunk_agree(first: int) -> None:
    for seed in range(first, first + 10):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 2000, 100))
def test_masked_and_shrunk_agree_on_all(first: int) -> None:
    for seed in range(first, first + 100):
        check(seed)


@functools.cache
def network(seed: int) -> tuple[str, go.Program, channels.Coupling]:
    """A random network, told in words, captured and coupled."""
    model, x = random_network(seed)
    program = go.capture(model, (x,))
    return f"seed {seed}: {model.describe()}", program, channels.couple(program)


def check(seed: int) -> None:
    said, program, coupling = network(seed) if seed < 100 else network.__wrapped__(seed)
    x = program.example_inputs[0]
    choice = draw(coupling.groups, seed)
    zeroed, small = masked(program, choice), shrunk(program, choice)
    other = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed + 1))
    first, first_slopes = slopes(zeroed, other)
    second, second_slopes = slopes(small, other)
    assert difference(first, second) <= TOLERANCE, said
    check_parameters(coupling, choice, first_slopes, second_slopes, small, said)
    check_cost(coupling, choice, program, small, said)
    check_what_is_held(zeroed, choice, other, said)


def slopes(program: go.Program, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of a weighted sum of it for each parameter."""
    module = program.graph_module
    module.zero_grad()
    y = program(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    (y * weights).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return y.detach(), {
        name: torch.zeros_like(module.get_parameter(name)) if grad is None else grad.clone()
        for name, grad in found.items()
    }


def check_parameters(
    coupling: channels.Coupling,
    choice: Choice,
    masked_slopes: dict[str, Tensor],
    shrunk_slopes: dict[str, Tensor],
    small: go.Program,
    said: str,
) -> None:
    """The members name what goes: values and gradients of what is left are those of the whole network."""
    expected = cut(coupling, choice, masked_slopes)
    folded = {_bias_of(node) for node, _, _ in coupling.walk.folds}
    values = cut(coupling, choice, coupling.program.graph_module.state_dict())
    for name, value in small.graph_module.state_dict().items():
        assert name in folded or torch.equal(value, values[name]), f"{name}; {said}"
    for name, slope in shrunk_slopes.items():
        assert slope.shape == small.graph_module.get_parameter(name).shape, said
        if name not in expected:
            assert name in folded, said  # a bias that took a constant
            continue
        assert difference(expected[name], slope) <= TOLERANCE, f"{name}; {said}"
    assert shrunk_slopes.keys() >= expected.keys(), said


def _bias_of(layer: fx.Node) -> str:
    """The name of a layer's bias, which it may not have yet."""
    arguments = ops.bind(layer)
    if arguments["bias"] is not None:
        return str(arguments["bias"].target)
    return f"{arguments['weight'].target.rpartition('.')[0]}.bias"


def check_cost(
    coupling: channels.Coupling, choice: Choice, program: go.Program, small: go.Program, said: str
) -> None:
    model = channels.CostModel(coupling)
    stats, before = small.stats(), program.stats()
    whole = model({})
    assert (whole.parameters, whole.macs) == (before.parameters, before.macs), said
    keep = {coupling.groups[number]: kept for number, kept in choice.items()}
    predicted = model(keep)
    assert (predicted.parameters, predicted.macs) == (stats.parameters, stats.macs), said
    if any(kept.numel() < group.size for group, kept in keep.items()):
        assert predicted.macs < whole.macs, said


class Held(fx.Interpreter):
    """Runs a masked program and compares every removed channel with what the coupling says that it holds."""

    def __init__(self, program: go.Program, coupling: channels.Coupling, kept: Any) -> None:
        super().__init__(program.graph_module)
        self.coupling, self.kept = coupling, kept
        self.compared = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        walk = self.coupling.walk
        if n.op == "call_function" and isinstance(value, Tensor) and not walk.is_constant(n):
            for axis, dimension in enumerate(walk.dims(n)):
                if isinstance(dimension, Axis):
                    self.compare(n, value.movedim(axis, 0), dimension)
        return value

    def compare(self, node: fx.Node, value: Tensor, axis: Axis) -> None:
        goes = ~self.kept[self.coupling.classes.of[axis.ids]]
        for index in np.flatnonzero(goes & np.isfinite(axis.rest)):
            expected = torch.full_like(value[index], float(axis.rest[index]))
            # averages of a constant round
            assert torch.allclose(value[index], expected, rtol=1e-12, atol=0), (
                f"{node.name} channel {index} should hold {axis.rest[index]}"
            )
            self.compared += 1


def check_what_is_held(zeroed: go.Program, choice: Choice, x: Tensor, said: str) -> None:
    """Zeros where the coupling says zeros, constants where it says constants, in every value of the masked network."""
    coupling = channels.couple(zeroed)
    keep = {coupling.groups[number]: kept for number, kept in choice.items()}
    interpreter = Held(zeroed, coupling, coupling.kept(keep))
    with torch.no_grad():
        interpreter.run(x)
    removes = any(kept.numel() < coupling.groups[n].size for n, kept in choice.items())
    assert bool(interpreter.compared) == removes, said


def test_every_kind_of_step_is_drawn_and_pruned() -> None:
    """The property above means something: channels of every kind of step are free in some of its networks."""
    free: Counter[str] = Counter()
    balanced = parts = folds = 0
    for seed in range(100):
        _, program, coupling = network(seed)
        balanced += sum(group.blocks > 1 for group in coupling.groups)
        parts += sum(group.parts > 1 for group in coupling.groups)
        folds += len(coupling.walk.folds)
        free.update(str(node.target) for node in program.graph.nodes if meets(coupling, node))
    missing = [name for name in WANTED if not any(f"aten.{name}." in target for target in free)]
    assert not missing
    assert balanced >= 5
    assert folds >= 2
    assert parts >= 1


def meets(coupling: channels.Coupling, node: fx.Node) -> bool:
    """True where a group's channels are in a value that a call reads or makes."""
    free = np.zeros(coupling.classes.number, bool)
    for group in coupling.groups:
        free[group.classes.numpy()] = True
    values = [coupling.walk.values[n] for n in (node, *node.all_input_nodes) if n.op != "output"]
    return node.op == "call_function" and any(
        isinstance(d, Axis) and d.is_named and free[coupling.classes.of[d.ids]].any()
        for d in pytree.tree_leaves(values)
    )
