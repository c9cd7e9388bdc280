"""One spelling of what PyTorch spells in several ways: ``conv2d(padding="same")`` -> numbers, ``concat`` -> ``cat``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.edit import graph_mode, propagate

aten = torch.ops.aten
_RENAMED: dict[Any, Any] = {
    aten._unsafe_view.default: aten.reshape.default,
    aten.clip.default: aten.clamp.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.divide.Tensor: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.swapaxes.default: aten.transpose.int,
    aten.true_divide.Tensor: aten.div.Tensor,
}
_CONVOLUTIONS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def canonicalize(module: fx.GraphModule) -> None:
    """Rewrite ``module`` in place; every result is the same bits."""
    for node in list(module.graph.nodes):
        if node.target in _CONVOLUTIONS:
            _spell_out_padding(node)
        elif node.target in _RENAMED:
            node.target = _RENAMED[node.target]
    module.recompile()


def _spell_out_padding(node: fx.Node) -> None:
    """``"same"`` pads ``dilation * (kernel - 1)`` in all, the odd one at the end, by an operator of its own."""
    arguments = ops.bind(node)
    kernel = arguments["weight"].meta["val"].shape[2:]
    dilation = arguments["dilation"]
    dilation = list(dilation) * len(kernel) if len(dilation) == 1 else list(dilation)
    total = [0] * len(kernel)
    if arguments["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(amount % 2 for amount in total):
        ends = [amount % 2 for amount in reversed(total)]
        with node.graph.inserting_before(node):
            padded = node.graph.call_function(
                aten.constant_pad_nd.default,
                (arguments["input"], [v for end in ends for v in (0, end)], 0.0),
            )
        padded.meta = dict(node.meta)
        padded.meta["val"] = propagate(padded, graph_mode(node.graph))
        arguments["input"] = padded
    arguments["padding"] = [amount // 2 for amount in total]
    node.target = _CONVOLUTIONS[node.target]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    node.args, node.kwargs = tuple(arguments[name] for name in names), {}
