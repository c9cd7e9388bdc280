"""What a layer reads: windows of its input on calibration data, or noise that neighbours share where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.edit import Edit
from graphopt.passes.patches import sample_patches

_NEIGHBOURS = (
    0.7  # correlation of adjacent pixels: of the activations of trained networks it is 0.5 to 0.9
)
_NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")


def windows(
    edit: Edit, nodes: list[fx.Node], calibration: Iterable[Any] | None, rows: int, seed: int
) -> dict[fx.Node, Tensor]:
    """At most ``rows`` windows [rows, in, k, l] of each convolution; its output there is the sum over ``W * window``.

    Without data: normal noise, channels independent, pixels correlated by 0.7 to the power of their distance, and its
    absolute value after an activation that is never negative.
    """
    if calibration is None:
        return {node: _noise(node, rows, seed) for node in nodes}
    sampled = sample_patches(edit, nodes, calibration, rows, seed)
    return {node: values.reshape(-1, *_window(node)) for node, values in sampled.items()}


def _window(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in ops.bind(node)["weight"].meta["val"].shape[1:])


def _noise(node: fx.Node, rows: int, seed: int) -> Tensor:
    channels, *kernel = _window(node)
    places = torch.cartesian_prod(*(torch.arange(float(k)) for k in kernel)).reshape(-1, 2)
    correlation = _NEIGHBOURS ** torch.cdist(places, places)
    root: Tensor = torch.linalg.cholesky(correlation)
    generator = torch.Generator().manual_seed(seed)
    values: Tensor = torch.randn(rows, channels, len(places), generator=generator) @ root.T
    if ops.is_op(ops.bind(node)["input"], *_NOT_NEGATIVE):
        values = values.abs()
    return values.reshape(rows, channels, *kernel)
