"""Programs whose parameters are on a GPU: what is pruned is decided in the CPU's memory, and nothing else is moved.

``Remote`` stands for the GPU's tensors: it refuses NumPy, and to meet tensors of the CPU in one operator.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphopt as go
from graphopt.arrays import to_numpy
from graphopt.passes.prune.decide import Choices, decide
from graphopt.passes.prune.evidence import Evidence
from graphopt.passes.prune.granularities import Block, Channel, Element, Granularity
from graphopt.passes.prune.schedules import Global, PerLayer, Schedule, Sensitivity
from graphopt.passes.prune.scores import (
    Activation,
    BatchNormScale,
    Magnitude,
    Obd,
    Score,
    Taylor,
)
from tests.passes.prune.support import capture, small_cnn, weights_of

_ROOT = Path(__file__).parents[3]
_MOVES = (Tensor.to, Tensor.copy_, Tensor.__repr__)


class Remote(Tensor):
    """A tensor of another device."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.cpu:
                return args[0].as_subclass(Tensor)
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            strangers = [t for t in tensors if t.dim() and not isinstance(t, Remote)]
        if strangers and func not in _MOVES:
            raise RuntimeError(f"{func}: tensors on two devices, cuda:0 and cpu")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.to and isinstance(args[1], Tensor):  # to the device of another tensor
            with torch._C.DisableTorchFunctionSubclass():
                return result.as_subclass(type(args[1]))
        return result


def remote(tensor: Tensor) -> Remote:
    return tensor.detach().clone().as_subclass(Remote)


def remote_program() -> go.Program:
    """The network with all that it holds on the other device; shapes are known from before."""
    program = capture(small_cnn(), 4, 3, 6, 6)
    for module in program.graph_module.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(remote(value)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, remote(buffer))
    return program


_ONE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
_LABELS = torch.arange(4)


@pytest.mark.parametrize(
    ("score", "schedule", "granularity"),
    [
        (Magnitude(), Global(0.5), Element()),
        (Magnitude(), PerLayer(0.5), Block(inputs=4)),
        (Taylor(), Global(0.5), Element()),
        (Obd(), Global(0.5), Element()),
        (Obd(curvature="hessian"), Global(0.5), Element()),
        (Magnitude(), Sensitivity(0.5), Element()),
        (Activation(), PerLayer(0.5), Channel()),
        (BatchNormScale(), PerLayer(0.5), Channel()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_decision_is_the_one_of_the_cpu(
    score: Score, schedule: Schedule, granularity: Granularity
) -> None:
    kept = []
    for program, move in (
        (capture(small_cnn(), 4, 3, 6, 6), lambda x: x),
        (remote_program(), remote),
    ):
        data = [(move(_ONE), move(_LABELS))]
        evidence = Evidence(program, "prune", data=data)
        choices = Choices(score, schedule, granularity)
        decisions = decide(choices, evidence, weights_of(program), lambda _node, _reason: None)
        masks = [mask for one in decisions for mask in one.granules.masks(one.keep).values()]
        assert masks
        assert not any(isinstance(mask, Remote) for mask in masks)
        kept.append(masks)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_mask_goes_where_its_weight_is() -> None:
    program = remote_program()
    weight = weights_of(program)[0]
    assert not isinstance(weight.tensor(program), Remote)
    assert isinstance(weight.on_device(program, torch.ones(weight.layout.shape)), Remote)


def test_values_of_another_device() -> None:
    assert (to_numpy(remote(torch.arange(3))) == [0, 1, 2]).all()
    with pytest.raises(TypeError):
        remote(torch.arange(3)).numpy()


def test_nothing_else_asks_a_tensor_for_an_array() -> None:
    """``tensor.numpy()`` fails on a GPU; ``to_numpy`` copies first."""
    found = []
    for path in sorted((_ROOT / "passes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "numpy":
                found.append(f"{path.relative_to(_ROOT)}:{node.lineno}")
    assert found == []
