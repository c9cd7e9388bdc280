"""Layers whose weights a factorization reproduces exactly, and what the tests ask of factored programs."""

from __future__ import annotations

import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.passes.factorize.factorize import Factorize
from tests.models import example
from tests.passes.quantize.nets import capture

PASSES: dict[str, type[Factorize]] = {
    name: cls for name, cls in go.registry.all_passes().items() if issubclass(cls, Factorize)
}
CONVOLUTIONS = tuple(name for name in PASSES if name != "low-rank-linear")


def planted(
    inputs: int, outputs: int, kernel: tuple[int, int] = (3, 3), rank: int = 2, **options: object
) -> nn.Conv2d:
    """A convolution that is a sum of ``rank`` rank-one terms: of rank ``rank`` in the sense of every factorization."""
    layer = nn.Conv2d(inputs, outputs, kernel, **options)  # type: ignore[arg-type]
    sizes = (outputs, inputs, *kernel)
    factors = [example(size, rank, seed=index) for index, size in enumerate(sizes)]
    weight = torch.einsum("or,ir,yr,xr->oiyx", *factors)
    layer.weight.data = weight / weight.std() / (inputs * kernel[0] * kernel[1]) ** 0.5
    return layer


def separable(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    """A convolution of one rank-one filter an output: flattened at rank 1, and of low rank in no other sense."""
    layer = nn.Conv2d(inputs, outputs, 3, **options)  # type: ignore[arg-type]
    parts = example(outputs, inputs), example(outputs, 3, seed=1), example(outputs, 3, seed=2)
    layer.weight.data = torch.einsum("oi,oy,ox->oiyx", *parts) / (9 * inputs) ** 0.5
    return layer


def depthwise(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    """A convolution of one filter an input channel."""
    layer = nn.Conv2d(inputs, outputs, 3, **options)  # type: ignore[arg-type]
    parts = example(outputs, inputs), example(inputs, 3, 3, seed=1)
    layer.weight.data = torch.einsum("oi,iyx->oiyx", *parts) / (9 * inputs) ** 0.5
    return layer


def alone(layer: nn.Module, *shape: int, **options: object) -> go.Program:
    """The program of one layer."""
    program: go.Program = capture(lambda m, x: m.layer(x), *shape, layer=layer, **options)
    return program


def layers_of(program: go.Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if ops.is_op(n, "conv1d", "conv2d", "linear")]


def gap(before: go.Program, after: go.Program, seed: int = 5) -> float:
    """The largest difference on another input, relative to the largest output."""
    x = example(*before.example_inputs[0].shape, seed=seed)
    with torch.no_grad():
        y = before(x)
        return float((after(x) - y).abs().max() / y.abs().max())
