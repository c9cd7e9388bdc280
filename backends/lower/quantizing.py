"""A ``graphopt::quantize`` that alone reads a layer's float32 result joins the layer's kernel.

So does the activation between the two: ``quantize(gelu(linear_dequantize(x)))`` writes bytes, and no float tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from graphopt.backends.lower import convolution, elementwise
from graphopt.backends.lower.convolution import ConvolutionStep, Window
from graphopt.backends.lower.elementwise import ConvertStep
from graphopt.backends.lower.fusing import sole_user
from graphopt.backends.lower.step import Step, value_of


def select_integer(node: fx.Node) -> Step | None:
    """``convolution.select_integer``, its result in bytes where a quantize follows and the kernel can write them."""
    step = convolution.select_integer(node)
    if not isinstance(step, ConvolutionStep) or not _can_quantize(step):
        return step
    quantize = _following_quantize(step.nodes[-1])
    if quantize is None:
        return step
    bounds, inverse_scale = quantize.parameters["requantize"], quantize.parameters["scale"]
    step.epilogue = replace(step.epilogue, requantize=bounds, inverse_scale=inverse_scale)
    step.nodes.append(quantize.output)
    step.output = quantize.output
    return step


def _can_quantize(step: ConvolutionStep) -> bool:
    """True for dense layers that cannot be Winograd's, whose tiles store floats before a long activation."""
    window, epilogue = step.window, step.epilogue
    winograd = window == Window((3, 3), (1, 1), window.padding)
    free = epilogue.requantize is None and not epilogue.float_residual
    return free and window.groups == 1 and not winograd


def _following_quantize(node: fx.Node) -> ConvertStep | None:
    """The step of the quantize to uint8 that alone reads ``node``."""
    user = sole_user(node)
    if user is None or user.target != torch.ops.graphopt.quantize.default:
        return None
    step = elementwise.select_integer(user)
    is_bytes = value_of(user).dtype == torch.uint8
    return step if isinstance(step, ConvertStep) and is_bytes else None
