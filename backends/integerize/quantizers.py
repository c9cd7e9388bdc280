"""Reading fake-quantize nodes: activations as ``QParams``, weights as int8 with a scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.backends.integerize.constants import Constants
from graphopt.errors import Decline, IntegerizeError
from graphopt.integer.arithmetic import MIN_SCALE, QParams

aten = torch.ops.aten

_PER_TENSOR = (
    aten.fake_quantize_per_tensor_affine.default,
    aten.fake_quantize_per_tensor_affine.tensor_qparams,
    aten._fake_quantize_learnable_per_tensor_affine.default,
)
_PER_CHANNEL = (
    aten.fake_quantize_per_channel_affine.default,
    aten._fake_quantize_learnable_per_channel_affine.default,
)
_WEIGHT_LIMIT = 128  # int8


@dataclass(frozen=True)
class Weight:
    """``real[o] = scale[o] * q[o]``: int8 ``q``, float32 ``scale`` of one element a channel; ``path`` names the tensor."""

    q: Tensor
    scale: Tensor
    path: str


def is_fake_quantize(node: Any) -> bool:
    """True for every form of ``fake_quantize``, the learnable ones too."""
    return isinstance(node, fx.Node) and node.target in (*_PER_TENSOR, *_PER_CHANNEL)


def activation(node: fx.Node, constants: Constants) -> QParams:
    """The parameters of a per-tensor fake-quantize, shifted so that ``qmin`` is 0 (the same real values, as uint8).

    Declines per-channel activations, parameters that are computed at run time, and more than 8 bits.
    Raises IntegerizeError for a scale that is zero, negative, NaN or infinite.
    """
    if node.target in _PER_CHANNEL:
        raise Decline("activations quantized per channel have no integer form")
    arguments = ops.bind(node)
    scale, zero_point = (_scalar(arguments[key], constants) for key in ("scale", "zero_point"))
    qmin, qmax = int(arguments["quant_min"]), int(arguments["quant_max"])
    if qmax - qmin > 255:
        raise Decline(f"activations of the range {qmin}..{qmax} need more than 8 bits")
    zero_point = round(min(max(zero_point, qmin), qmax))
    try:
        return QParams(scale, zero_point - qmin, 0, qmax - qmin)
    except IntegerizeError as error:
        raise IntegerizeError(f"node {node.name!r}: {error}") from error


def _scalar(value: Any, constants: Constants) -> float:
    if not isinstance(value, fx.Node):
        return float(value)
    tensor = constants.value(value)
    if tensor is None or tensor.numel() != 1:
        raise Decline("its scale or zero point is no constant scalar")
    return float(tensor)


def weight(node: Any, constants: Constants) -> Weight:
    """The int8 form of a fake-quantized constant weight, one scale for each index of axis 0.

    The integers are read from what torch itself computes. A channel of zeros alone gets the largest scale of its
    layer: its own may be so small that the bias, counted in steps of it, leaves int32.
    Declines weights that are not fake-quantized, not constant, asymmetric, wider than 8 bits or of another axis.
    """
    if not is_fake_quantize(node):
        raise Decline("its weight is not fake-quantized")
    real = constants.value(node)
    if real is None:
        raise Decline("its weight is computed from an input")
    arguments = ops.bind(node)
    if int(arguments["quant_min"]) < -_WEIGHT_LIMIT or int(arguments["quant_max"]) >= _WEIGHT_LIMIT:
        raise Decline("its weight does not fit int8")
    if node.target in _PER_CHANNEL and arguments["axis"] not in (0, -real.dim()):
        raise Decline(f"its weight is quantized along axis {arguments['axis']}, not 0")
    if bool((_tensor(arguments["zero_point"], constants).round() != 0).any()):
        raise Decline("its weight is quantized asymmetrically")
    scale = _tensor(arguments["scale"], constants).to(torch.float32).flatten()
    scale = scale.expand(real.shape[0]).clone()
    if not bool((torch.isfinite(scale) & (scale >= MIN_SCALE)).all()):
        raise IntegerizeError(
            f"node {node.name!r}: a weight's scale is zero, negative or not finite; calibrate the layer again"
        )
    steps = real.to(torch.float64) / scale.to(torch.float64).reshape(-1, *[1] * (real.dim() - 1))
    q = torch.round(steps).to(torch.int8)
    scale[(q == 0).flatten(1).all(1)] = scale.max()
    return Weight(q, scale, constants.source(node) or node.name)


def _tensor(value: Any, constants: Constants) -> Tensor:
    if not isinstance(value, fx.Node):
        return torch.tensor(value, dtype=torch.float64)
    tensor = constants.value(value)
    if tensor is None:
        raise Decline("its weight's scale or zero point is no constant")
    return tensor
