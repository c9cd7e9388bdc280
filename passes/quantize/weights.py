"""Fake quantization of weights: ``w -> fq(w)``, one node for a weight however many layers read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.edit import Edit
from graphopt.errors import QuantizeError
from graphopt.passes import layer
from graphopt.passes.quantize.qparams import QParams, weight_scales
from graphopt.passes.quantize.regions import Regions, is_fake_quantize
from graphopt.passes.quantize.spec import WeightSpec

_BIAS_STEPS = 2.0**30  # |bias| / (s_x * s_w) stays below this, half of int32


def check_weights(edit: Edit, node: fx.Node) -> None:
    """Raise QuantizeError where a layer's weight or bias holds NaN or infinity."""
    arguments = ops.bind(node)
    for role in ("weight", "bias"):
        for source in _parameters(arguments[role]):
            tensor = edit.program.tensor(source)
            if not bool(torch.isfinite(tensor).all()):
                what = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                raise QuantizeError(
                    f"{edit.pass_name}: tensor {str(source.target)!r} of {layer.describe(node)} "
                    f"holds {what}; mend the {role} before quantization"
                )


def constant_value(edit: Edit, value: fx.Node) -> torch.Tensor:
    """What a constant expression (a parameter, a masked weight) evaluates to."""
    if value.op == "get_attr":
        return edit.program.tensor(value).detach()
    with torch.no_grad():
        args = fx.map_arg((value.args, value.kwargs), lambda n: constant_value(edit, n))
        return value.target(*args[0], **args[1])  # type: ignore[operator, no-any-return]


def _parameters(value: fx.Node | None) -> list[fx.Node]:
    if value is None:
        return []
    if value.op == "get_attr":
        return [value] if value.meta["val"].is_floating_point() else []
    return [source for node in value.all_input_nodes for source in _parameters(node)]


def quantize_weights(edit: Edit, regions: Regions, qparams: dict[fx.Node, QParams]) -> None:
    """One fake-quant a weight and spec, also where several layers share the weight."""
    shared: dict[tuple[Any, WeightSpec], list[fx.Node]] = {}
    for node in regions.seeds:
        weight = ops.bind(node)["weight"]
        key = weight.target if weight.op == "get_attr" else weight
        shared.setdefault((key, regions.spec.weights_of(node)), []).append(node)
    for (_, spec), users in shared.items():
        weight = ops.bind(users[0])["weight"]
        tensor = constant_value(edit, weight)
        floor = torch.zeros(tensor.shape[0], dtype=torch.float64)
        for node in users:
            floor = torch.maximum(
                floor, _scale_floor(edit, regions, node, qparams, tensor.shape[0])
            )
        new = _fake_quantized_weight(edit, users, weight, weight_scales(tensor, spec, floor), spec)
        for node in users:
            edit.replace_argument(node, "weight", new)


def _scale_floor(
    edit: Edit, regions: Regions, node: fx.Node, qparams: dict[fx.Node, QParams], channels: int
) -> torch.Tensor:
    """The least weight scale at which the bias fits int32."""
    bias = ops.bind(node)["bias"]
    if bias is None:
        return torch.zeros(channels, dtype=torch.float64)
    source = _source(regions, ops.bind(node)["input"])
    input_scale = (
        float(ops.bind(source)["scale"]) if is_fake_quantize(source) else qparams[source].scale
    )
    return constant_value(edit, bias).double().abs() / (input_scale * _BIAS_STEPS)


def _source(regions: Regions, value: fx.Node) -> fx.Node:
    """The value whose parameters ``value`` has: itself, or what operators that only move elements read."""
    while value in regions.active and regions.moves(value):
        value = regions.inputs(value)[0]
    return value


def _fake_quantized_weight(
    edit: Edit, users: list[fx.Node], weight: fx.Node, scales: torch.Tensor, spec: WeightSpec
) -> fx.Node:
    first = min(users)
    build = edit.build(first, [weight])
    if not spec.per_channel:
        return build.fake_quantize(weight, float(scales[0]), 0, spec.qmin, spec.qmax)
    name = str(weight.target) if weight.op == "get_attr" else weight.name
    scale = build.parameter(f"{name}_scale", scales, trainable=False)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    zero_point = build.parameter(f"{name}_zero_point", zeros, trainable=False)
    return build.fake_quantize_channel(weight, scale, zero_point, 0, spec.qmin, spec.qmax)
