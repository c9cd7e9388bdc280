"""Batch norm in evaluation mode is ``y = x * s + t``, ``s = gamma / sqrt(variance + eps)``, ``t = beta - mean * s``."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import ops
from graphopt.edit import Build
from graphopt.pattern import Call, Match, Operators, const

# Folding rounds a weight once more: in half precision by up to 2^-9, which no float32 bound covers.
HALF = (torch.float16, torch.bfloat16)


def batch_norm(op: Operators, x: object) -> Call:
    """The pattern of a batch norm of ``x``, named ``"bn"``."""
    parameters = [const(name, optional=True) for name in ("gamma", "beta", "mean", "variance")]
    return op.batch_norm(x, *parameters, name="bn")


def check_affine(match: Match) -> None:
    """Decline a batch norm that is no fixed affine map of its input."""
    if "mean" not in match or "variance" not in match:
        match.decline("batch norm keeps no running statistics")
    if match.argument("bn", "training"):
        match.decline("batch norm is in training mode; call program.eval() first")
    if not all(bool(torch.isfinite(values).all()) for values in scale_and_shift(match)):
        match.decline("the scale or shift of the batch norm is not finite")


def scale_and_shift(match: Match) -> tuple[torch.Tensor, torch.Tensor]:
    """``s`` and ``t`` in float64, one value a channel."""
    scale = torch.rsqrt(match.tensor("variance").double() + match.argument("bn", "eps"))
    if "gamma" in match:
        scale = scale * match.tensor("gamma").double()
    shift = -match.tensor("mean").double() * scale
    if "beta" in match:
        shift = shift + match.tensor("beta").double()
    return scale, shift


def weight_of(layer: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The node of the parameter ``W`` and that of the mask ``M``, None where the weight is no ``W * M``."""
    weight = ops.bind(layer)["weight"]
    if not ops.is_op(weight, "mul"):
        return weight, None
    first, second = weight.args[:2]
    constants = all(isinstance(f, fx.Node) and f.op == "get_attr" for f in (first, second))
    if constants and first.meta["val"].shape == second.meta["val"].shape:
        return first, second
    return weight, None


def check_layer(match: Match, half: bool) -> None:
    """Decline a layer (named ``"layer"``) whose weight or bias is computed, shared or too coarse to be changed."""
    layer = match["layer"]
    weight, _ = weight_of(layer)
    for role, parameter in (("weight", weight), ("bias", ops.bind(layer)["bias"])):
        if parameter is None:
            continue
        if parameter.op != "get_attr":
            match.decline(
                f"the {role} of {layer.name} is computed by {parameter.name}; fold before quantization"
            )
        match.unshared_parameter(parameter)
    if weight.meta["val"].dtype in HALF and not half:
        match.decline("half-precision weights round by more than 1e-4; half=True folds them")


def with_parameters(
    build: Build, match: Match, x: fx.Node, weight: torch.Tensor, bias: torch.Tensor
) -> fx.Node:
    """The layer on ``x`` with other values of ``W`` and bias, under the names it had; a mask is kept."""
    layer = match["layer"]
    arguments = ops.bind(layer)
    parameter, mask = weight_of(layer)
    dtype = parameter.meta["val"].dtype
    new_weight = build.update(parameter, weight.to(dtype))
    if arguments["bias"] is not None:
        new_bias = build.update(arguments["bias"], bias.to(dtype))
    else:
        owner = str(parameter.target).rpartition(".")[0]
        new_bias = build.parameter(f"{owner}.bias" if owner else "bias", bias.to(dtype))
    if mask is not None:
        new_weight = build.mul(new_weight, mask)
    changed = {"input": x, "weight": new_weight, "bias": new_bias}
    return build.call(layer.target, *{**arguments, **changed}.values())
