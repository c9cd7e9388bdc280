"""Fake-quantized modules to integerize, and what they compute in float64: the reference for every integer result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import graphopt as go
from graphopt import ops
from graphopt.backends.integerize import integerize
from graphopt.backends.integerize.quantizers import is_fake_quantize

Function = Callable[..., Tensor]


def fq(
    x: Tensor, scale: float = 0.05, zero_point: int = 128, low: int = 0, high: int = 255
) -> Tensor:
    """An activation's fake-quantize."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


class Weights(nn.Module):
    """``call(self, *inputs)`` with seeded weights: ``weight()`` is fake-quantized per output channel, ``bias`` float."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor

    def __init__(self, call: Function, *shape: int, seed: int = 0, axis: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._call = call
        self._axis = axis
        if shape:
            weight = torch.randn(*shape, generator=generator) * (weight_fan(shape) ** -0.5)
            self.weight = nn.Parameter(weight)
            others = [dim for dim in range(len(shape)) if dim != axis]
            self.register_buffer("scale", weight.abs().amax(others) / 127)
            self.register_buffer("zero_point", torch.zeros(shape[axis], dtype=torch.int32))
            self.bias = nn.Parameter(torch.randn(shape[0], generator=generator) * 0.3)

    def quantized(self, low: int = -127, high: int = 127) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            self.weight, self.scale, self.zero_point, self._axis, low, high
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call(self, *inputs)


def weight_fan(shape: tuple[int, ...]) -> int:
    """Inputs of one output channel."""
    return max(1, torch.Size(shape[1:]).numel())


def image(*shape: int, seed: int = 1) -> Tensor:
    """Seeded normal values, within the range of ``fq``'s defaults but for a few."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def captured(
    call: Function, *inputs: Tensor, weight: tuple[int, ...] = (), axis: int = 0
) -> go.Program:
    """A program of ``call(module, *inputs)``."""
    program: go.Program = go.capture(Weights(call, *weight, axis=axis).eval(), inputs)
    return program


class _Simulation(fx.Interpreter):
    """Runs a fake-quantized graph in float64, rounding included.

    ``forced`` maps fake-quantize nodes to the values that readers see instead; ``steps`` collects how many steps those
    are away from the values computed here.
    """

    def __init__(self, module: fx.GraphModule, forced: dict[str, Tensor] | None = None) -> None:
        super().__init__(module)
        self.forced = forced or {}
        self.steps: dict[str, Tensor] = {}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.double() if value.is_floating_point() else value

    def run_node(self, n: fx.Node) -> Any:
        if not is_fake_quantize(n):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, scale, zero_point = args[:3]
        if "per_channel" in str(n.target):
            shape = [1] * x.dim()
            shape[args[3]] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        low, high = ops.bind(n)["quant_min"], ops.bind(n)["quant_max"]
        scale = torch.as_tensor(scale, dtype=torch.float32).double()
        q = torch.clamp(torch.round(x / scale) + zero_point, low, high)
        value = (q - zero_point) * scale
        if n.name not in self.forced:
            return value
        self.steps[n.name] = ((self.forced[n.name].double() - value) / scale).abs()
        return self.forced[n.name].double()


def simulate(program: go.Program, *inputs: Tensor) -> Tensor:
    """The program's output in float64 arithmetic."""
    with torch.no_grad():
        simulation = _Simulation(program.graph_module)
        result: Tensor = simulation.run(*(x.double() for x in inputs))
    return result


def steps_at_each_quantizer(program: go.Program, *inputs: Tensor) -> dict[str, Tensor]:
    """How far every fake-quantized activation is, at the integer level, from float64 on *the same* integer inputs.

    The program is integerized with all of them as outputs; what the integers give at one is what the simulation goes
    on with, so that a difference shows where it arises and nowhere else.
    """
    whole = program.clone()
    quantizers = [
        node
        for node in whole.graph.nodes
        if is_fake_quantize(node) and node.args[0].op != "get_attr"
    ]
    whole.output.args = (tuple(quantizers),)
    whole.graph.set_codegen(fx.graph.CodeGen())
    whole.graph_module.recompile()
    with torch.no_grad():
        values = integerize(whole)(*inputs)
        forced = {node.name: value for node, value in zip(quantizers, values, strict=True)}
        simulation = _Simulation(program.graph_module, forced)
        simulation.run(*(x.double() for x in inputs))
    return simulation.steps


def names(program: go.Program) -> list[str]:
    """The calls of a graph, in order, without overloads; ours without their namespace, ATen's with a dot in front."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        name = schema.name if schema is not None else node.target.__name__
        found.append(name.replace("graphopt::", "").replace("aten::", "."))
    return found


def call_of(program: go.Program, name: str) -> dict[str, Any]:
    """The arguments of the only call of ``graphopt::name``."""
    target = getattr(torch.ops.graphopt, name).default
    (node,) = (node for node in program.graph.nodes if node.target is target)
    return ops.bind(node)


def assert_equal_steps(
    program: go.Program,
    integer: go.Program,
    *inputs: Tensor,
    step: float = 0.05,
    differ: float = 1e-2,
) -> None:
    """Outputs on a grid of ``step``: never two steps apart, one step apart for at most the share ``differ``.

    A step is lost where the bias, rounded to half of ``s_x * s_w`` (up to 0.5 % of the output's step in these layers),
    moves a value over a tie.
    """
    with torch.no_grad():
        result = integer(*inputs).double()
    steps = torch.round((result - simulate(program, *inputs)).abs() / step)
    assert steps.max() <= 1
    assert (steps > 0).double().mean() <= differ
