"""Equalize the ranges of channels across layers: ``w1[c] / s[c]``, ``w2[:, c] * s[c]``, ``s = sqrt(r1 / r2)``.

``r1[c]`` and ``r2[c]`` are the largest magnitudes of channel c in the first layer's rows and the second layer's columns;
afterwards both are ``sqrt(r1 * r2)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.contract import Contract, lossy, within
from graphopt.edit import Edit
from graphopt.passes.quantize.regions import is_fake_quantize
from graphopt.passing import Pass
from graphopt.registry import register

_LAYERS = ("conv1d", "conv2d", "conv2d_same", "linear")
# f(s * x) = s * f(x) for s > 0, channel by channel.
_HOMOGENEOUS = ("relu", "leaky_relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "alias")
_ROUNDS = 50
_CONVERGED = 0.02  # a pair whose scales are all within 2 % of 1 is left as it is


@dataclass(frozen=True)
class _Pair:
    first: fx.Node
    second: fx.Node
    clamps: tuple[fx.Node, ...]  # ReLU6 between them


@register
@dataclass(frozen=True)
class EqualizeWeights(Pass):
    """``layer2(relu(layer1(x))) -> layer2'(relu(layer1'(x)))`` with channel ranges made equal (Nagel et al. 2019, 4.1).

    Over chains of convolutions (dense, grouped, depthwise) or of linear layers with ReLU, leaky ReLU or pooling
    between, repeated until no scale moves. ReLU6 breaks the equation: such pairs decline unless ``replace_relu6`` puts
    a ReLU there, which makes the pass lossy. Of a pruned weight the range is that of ``W * M``, and W is scaled. Declines
    values that something else reads, and weights that are shared, computed or fake-quantized. Run it after
    fold-batch-norm and before quantize.
    """

    name: ClassVar[str] = "equalize-weights"
    contract: ClassVar[Contract] = within(1e-4)
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)

    replace_relu6: bool = False

    def promised(self) -> Contract:
        return lossy if self.replace_relu6 else self.contract

    def apply(self, edit: Edit) -> None:
        pairs = list(self._pairs(edit))
        for pair in pairs:
            for clamp in pair.clamps:
                edit.replace(clamp, edit.build(clamp).relu(clamp.args[0]))
        tensors = {
            node: edit.program.tensor(node).detach().double()
            for pair in pairs
            for layer in (pair.first, pair.second)
            for node in _parameters(layer)
        }
        masks = {
            weight: edit.program.tensor(mask).double()
            for pair in pairs
            for weight, mask in map(_weight_and_mask, (pair.first, pair.second))
            if mask is not None
        }
        changed: dict[fx.Node, None] = {}
        for _ in range(_ROUNDS):
            moved = [node for pair in pairs for node in _equalize(pair, tensors, masks)]
            changed.update(dict.fromkeys(moved))
            if not moved:
                break
        for node in changed:
            edit.set_tensor(node, tensors[node].to(edit.program.tensor(node).dtype))

    def _pairs(self, edit: Edit) -> Iterator[_Pair]:
        for first in edit.nodes(*_LAYERS):
            second, clamps = _follow(first)
            if second is None:
                continue
            reason = _unfit(edit, first) or _unfit(edit, second)
            if reason is None and clamps and not self.replace_relu6:
                reason = (
                    "ReLU6 does not scale with its input: set replace_relu6 to put a ReLU there"
                )
            if reason is not None:
                edit.decline(first, reason)
                continue
            yield _Pair(first, second, clamps)


def _follow(first: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The layer that alone reads ``first`` through operators that scale, and the ReLU6 on the way."""
    value = first
    clamps: list[fx.Node] = []
    while len(value.users) == 1:
        user = next(iter(value.users))
        if ops.is_op(user, *_LAYERS):
            is_chain = ops.bind(user)["input"] is value
            is_same = ops.is_op(user, "linear") == ops.is_op(first, "linear")
            return (user if is_chain and is_same else None), tuple(clamps)
        if _is_relu6(user):
            clamps.append(user)
        elif not ops.is_op(user, *_HOMOGENEOUS):
            break
        value = user
    return None, ()


def _is_relu6(node: fx.Node) -> bool:
    if ops.is_op(node, "relu6"):
        return True
    if not ops.is_op(node, "hardtanh", "clamp"):
        return False
    low, high = list(ops.bind(node).values())[1:3]
    return low == 0 and high is not None


def _unfit(edit: Edit, layer: fx.Node) -> str | None:
    """Why a layer's parameters cannot be scaled, or None."""
    for role, value in (("weight", _weight_and_mask(layer)[0]), ("bias", ops.bind(layer)["bias"])):
        if value is None:
            continue
        if is_fake_quantize(value):
            return f"the {role} of {layer.name} is already fake-quantized"
        if value.op != "get_attr":
            return f"the {role} of {layer.name} is computed"
        readers = [n for n in edit.graph.nodes if n.op == "get_attr" and n.target == value.target]
        if sum(len(node.users) for node in readers) != 1:
            return f"the {role} of {layer.name} is shared"
    return None


def _weight_and_mask(layer: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The parameter of a layer's weight, and the mask of a pruned one."""
    weight = ops.bind(layer)["weight"]
    return ops.masked(weight) or (weight, None)


def _parameters(layer: fx.Node) -> list[fx.Node]:
    values = (_weight_and_mask(layer)[0], ops.bind(layer)["bias"])
    return [value for value in values if value is not None]


def _equalize(
    pair: _Pair, tensors: dict[fx.Node, Tensor], masks: dict[fx.Node, Tensor]
) -> list[fx.Node]:
    """Scale one pair in place; the parameters that moved."""
    above, below = _weight_and_mask(pair.first)[0], _weight_and_mask(pair.second)[0]
    groups = int(ops.bind(pair.second).get("groups", 1))

    def by_group(weight: Tensor) -> Tensor:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)

    rows, columns = tensors[above], tensors[below]
    r1 = (rows * masks.get(above, 1.0)).abs().flatten(1).amax(dim=1)
    r2 = by_group(columns * masks.get(below, 1.0)).abs().amax(dim=(1, 3)).flatten()
    scale = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
    if bool(((scale - 1).abs() <= _CONVERGED).all()):
        return []
    tensors[above] = rows / scale.reshape(-1, *[1] * (rows.dim() - 1))
    grouped = by_group(columns) * scale.reshape(groups, 1, -1, 1)
    tensors[below] = grouped.reshape(columns.shape)
    bias = ops.bind(pair.first)["bias"]
    if bias is not None:
        tensors[bias] = tensors[bias] / scale
    return [*_parameters(pair.first), below]
