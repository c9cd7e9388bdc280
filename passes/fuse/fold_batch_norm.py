"""Batch norm disappears into the weights of the layer before it, or of the layer after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt import ops
from graphopt.contract import Contract, within
from graphopt.edit import Build
from graphopt.passes.fuse.affine import (
    batch_norm,
    check_affine,
    check_layer,
    scale_and_shift,
    weight_of,
    with_parameters,
)
from graphopt.passing import RewritePass
from graphopt.pattern import Call, Match, Operators, var
from graphopt.registry import register
from graphopt.rule import RewriteRule

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv1d_same", "conv2d_same")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _per_output(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[out]`` as it multiplies a weight ``[out, in, ...]``."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _per_transposed_output(scale: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``[out]`` as it multiplies a weight ``[in, out / groups, ...]``: group g of rows makes group g of outputs."""
    inputs = weight.shape[0] // groups
    grouped = scale.reshape(groups, 1, -1).expand(groups, inputs, -1)
    return grouped.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _per_input(values: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``[in]`` as it multiplies a weight ``[out, in / groups, ...]``: group g of outputs reads group g of inputs."""
    outputs = weight.shape[0] // groups
    grouped = values.reshape(groups, 1, -1).expand(groups, outputs, -1)
    return grouped.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _bias(match: Match, outputs: int) -> torch.Tensor:
    bias = match.argument("layer", "bias")
    if bias is None:
        return torch.zeros(outputs, dtype=torch.float64)
    return match.program.tensor(bias).detach().double()


def _weights(match: Match) -> tuple[torch.Tensor, torch.Tensor]:
    """``W`` and the effective weight ``W * M`` (the same where nothing is pruned), in float64."""
    parameter, mask = weight_of(match["layer"])
    weight = match.program.tensor(parameter).detach().double()
    return weight, weight if mask is None else weight * match.program.tensor(mask).double()


def _groups(match: Match) -> int:
    return int(ops.bind(match["layer"]).get("groups", 1))


@dataclass(frozen=True)
class BatchNormAfter(RewriteRule):
    """``bn(layer(x, W, b)) -> layer(x, W * s, b * s + t)``, s along the output channels."""

    half: bool = False

    def pattern(self, op: Operators) -> Call:
        layer = op.any("linear", *_CONVOLUTIONS, *_TRANSPOSED)(name="layer")
        return batch_norm(op, layer)

    def check(self, match: Match) -> None:
        match.sole_use("layer")
        check_affine(match)
        check_layer(match, self.half)
        weight, _ = weight_of(match["layer"])
        if len(match.shape("layer")) != weight.meta["val"].dim():
            match.decline(f"dimension 1 of {match['layer'].name} is not its output channels")

    def rewrite(self, build: Build, match: Match) -> fx.Node:
        scale, shift = scale_and_shift(match)
        weight, _ = _weights(match)
        if ops.is_op(match["layer"], *_TRANSPOSED):
            factor = _per_transposed_output(scale, weight, _groups(match))
        else:
            factor = _per_output(scale, weight)
        bias = _bias(match, len(scale)) * scale + shift
        return with_parameters(
            build, match, match.argument("layer", "input"), weight * factor, bias
        )


@dataclass(frozen=True)
class BatchNormBefore(RewriteRule):
    """``layer(bn(x), W, b) -> layer(x, W * s, b + sum(W * t))``, s and t along the input channels.

    Exact only where every output reads the shift through all of the kernel: padding puts 0 where batch norm puts t.
    """

    half: bool = False

    def pattern(self, op: Operators) -> Call:
        return op.any("linear", *_CONVOLUTIONS)(batch_norm(op, var("x")), name="layer")

    def check(self, match: Match) -> None:
        match.sole_use("bn")
        check_affine(match)
        check_layer(match, self.half)
        weight, _ = weight_of(match["layer"])
        if len(match.shape("bn")) != weight.meta["val"].dim():
            match.decline(
                f"dimension 1 of {match['bn'].name} is not the input channels of {match['layer'].name}"
            )
        _, shift = scale_and_shift(match)
        if _pads(match) and bool(shift.any()):
            match.decline(
                f"{match['layer'].name} pads with zeros, where the batch norm has a shift"
            )

    def rewrite(self, build: Build, match: Match) -> fx.Node:
        scale, shift = scale_and_shift(match)
        weight, effective = _weights(match)
        groups = _groups(match)
        contribution = effective * _per_input(shift, weight, groups)
        bias = _bias(match, weight.shape[0]) + contribution.flatten(1).sum(1)
        factor = _per_input(scale, weight, groups)
        return with_parameters(build, match, match["x"], weight * factor, bias)


def _pads(match: Match) -> bool:
    padding = ops.bind(match["layer"]).get("padding", ())
    return padding != "valid" if isinstance(padding, str) else any(padding)


@register
@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """``batch_norm(conv(x, w, b)) -> conv(x, w * s, b * s + t)``, ``s = gamma / sqrt(variance + eps)``, ``t = beta - mean * s``.

    Convolutions in 1, 2 and 3 dimensions, transposed ones and linear layers before a batch norm; convolutions and
    linear layers after one where nothing is padded. Computed in float64; parameters keep their names, and a pruned weight
    its mask. Declines a layer that something else reads, parameters that another layer reads or that are computed,
    batch norm in training mode or without running statistics, and half precision unless ``half=True``, which widens the
    contract to ``within(1e-2)``.
    """

    name = "fold-batch-norm"
    contract = within(1e-4)

    half: bool = False

    def promised(self) -> Contract:
        return within(1e-2) if self.half else within(1e-4)

    def active_rules(self) -> tuple[RewriteRule, ...]:
        return (BatchNormAfter(self.half), BatchNormBefore(self.half))
