"""Compile, run and compare: what every end-to-end test asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt.artifact import Artifact
from graphopt.backends.targets import TARGETS

RUNNABLE = tuple(name for name, row in TARGETS.items() if row.runs_here())

Arrays = list[np.ndarray[Any, Any]]


def quantized(model: nn.Module, inputs: tuple[Tensor, ...], batches: int = 2) -> go.Program:
    """The one-line int8 recipe, calibrated on ``inputs`` and noise like it."""
    generator = torch.Generator().manual_seed(0)
    noise = [
        tuple(torch.randn(x.shape, generator=generator) for x in inputs) for _ in range(batches - 1)
    ]
    return go.passes.Quantize(calibration=[inputs, *noise])(go.capture(model, inputs))


def compiled(program: go.Program, target: str = "native", threads: int = 1) -> Artifact:
    artifact: Artifact = go.compile(program, target=target, threads=threads)
    return artifact


def run(artifact: Artifact, inputs: tuple[Tensor, ...]) -> Arrays:
    """Outputs of the compiled code, flattened."""
    session = artifact.session()
    return pytree.tree_leaves(session(*(x.numpy() for x in inputs)))


def reference(program: go.Program, inputs: tuple[Tensor, ...]) -> Arrays:
    """Outputs of the program in PyTorch, flattened."""
    with torch.no_grad():
        return [value.numpy() for value in pytree.tree_leaves(program(*inputs))]


def float_islands(program: go.Program) -> list[str]:
    """Nodes that compute in float between the first quantize and the last dequantize, or after it.

    Where there are none the definition leaves no rounding open, and compiled code must give the same bits.
    """
    borders = {torch.ops.graphopt.quantize.default, torch.ops.graphopt.dequantize.default}
    integer = {"conv2d_dequantize", "linear_dequantize", "global_avg_pool_dequantize"}
    names = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
        ):
            continue
        op = go.ops.info(node)
        moves = op is not None and (op.kind in ("shape", "concat", "pad") or op.name == "dropout")
        name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        if node.target not in borders and name not in integer and not moves and name != "getitem":
            names.append(node.name)
    return names


def assert_bit_equal(got: Arrays, want: Arrays) -> None:
    for ours, defined in zip(got, want, strict=True):
        assert ours.dtype == defined.dtype
        assert ours.shape == defined.shape
        wrong = np.flatnonzero((ours != defined).reshape(-1))
        assert not wrong.size, (
            f"{wrong.size} of {ours.size} elements differ, the first at {wrong[0]}"
        )
