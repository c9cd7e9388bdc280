"""The rows of a layer's matrix product: what each output position of a convolution or linear layer reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphopt import ops
from graphopt.edit import Edit
from graphopt.passes.calibration import RowSample, watch


def sample_patches(
    edit: Edit, nodes: Iterable[fx.Node], calibration: Iterable[Any], limit: int, seed: int = 0
) -> dict[fx.Node, Tensor]:
    """At most ``limit`` random rows ``x`` [rows, K] of each layer, so that its output there is ``x @ W.flatten(1).T + b``.

    For linear layers and for ungrouped convolutions of 1 or 2 dimensions. All layers are seen in one run over the data.
    """
    samples = {node: RowSample(limit, seed) for node in nodes}

    def see(node: fx.Node, x: Tensor, y: Tensor) -> None:
        samples[node].add(
            positions(node, y), lambda chosen: (patches(node, x, chosen).to(torch.float32),)
        )

    watch(edit, samples, calibration, see)
    return {node: sample.rows()[0] for node, sample in samples.items()}


def positions(node: fx.Node, output: Tensor) -> int:
    """How many rows a layer's product has: the output's elements of one channel."""
    op = ops.info(node)
    assert op is not None
    return output.numel() // output.shape[op.channel_axis]


def patches(node: fx.Node, x: Tensor, chosen: Tensor) -> Tensor:
    """The rows [len(chosen), in_channels * taps] at output positions (batch, row, column) ``chosen``, in their order."""
    if ops.is_op(node, "linear"):
        return x.reshape(-1, x.shape[-1])[chosen]
    arguments = ops.bind(node)
    kernel = list(arguments["weight"].meta["val"].shape[2:])
    stride, dilation = (each(arguments[name], len(kernel)) for name in ("stride", "dilation"))
    before, after = margins(node)
    sides = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
    x = F.pad(x, sides)
    sizes = [
        (x.shape[2 + axis] - dilation[axis] * (k - 1) - 1) // stride[axis] + 1
        for axis, k in enumerate(kernel)
    ]
    at = torch.unravel_index(chosen, (x.shape[0], *sizes))
    index: list[Tensor | slice] = [at[0].reshape(-1, *[1] * len(kernel)), slice(None)]
    for axis, k in enumerate(kernel):
        taps = at[1 + axis][:, None] * stride[axis] + torch.arange(k) * dilation[axis]
        shape = [len(chosen)] + [1] * len(kernel)
        shape[1 + axis] = k
        index.append(taps.reshape(shape))
    # advanced indices around a slice: the result is [rows, taps..., in_channels]
    rows = x[tuple(index)]
    return rows.movedim(-1, 1).flatten(1)


def margins(node: fx.Node) -> tuple[list[int], list[int]]:
    """A convolution's zero padding before and after each spatial axis, ``padding="same"`` resolved."""
    arguments = ops.bind(node)
    kernel = list(arguments["weight"].meta["val"].shape[2:])
    padding = arguments["padding"]
    if padding == "valid":
        padding = [0]
    if padding != "same":
        both = each(padding, len(kernel))
        return both, both
    total = [
        d * (k - 1) for d, k in zip(each(arguments["dilation"], len(kernel)), kernel, strict=True)
    ]
    before = [size // 2 for size in total]
    return before, [size - half for size, half in zip(total, before, strict=True)]


def each(value: Any, axes: int) -> list[int]:
    """One number an axis, also where one stands for all."""
    values = [int(value)] if isinstance(value, int) else [int(v) for v in value]
    return values * axes if len(values) == 1 else values
