"""Convolutions and linear layers as steps: float and integer, with what their epilogue can carry.

Fused: an activation (float), a residual sum (integer ``graphopt::add``, float ``aten.add``, the latter after a
dequantizing linear layer too), a batch norm that nothing could fold (as a 1 x 1 depthwise convolution).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cpu.candidates import fits, workload_key
from graphopt.backends.cpu.conv import conv2d
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.cpu.depthwise import depthwise, pack_depthwise
from graphopt.backends.cpu.rivals import is_depthwise, is_winograd
from graphopt.backends.cpu.sparse import sparse
from graphopt.backends.cpu.sparse_forms import rounds_in_range
from graphopt.backends.cpu.sparse_pack import pack_sparse
from graphopt.backends.cpu.sparse_plan import plan_sparse
from graphopt.backends.cpu.winograd import winograd
from graphopt.backends.cpu.winograd_plan import plan_winograd, sums_fit
from graphopt.backends.cpu.winograd_weights import pack_winograd, weight_transform
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout, QuantizedAdd, Requantize
from graphopt.backends.lower.fusing import following_activation, later_residual, sole_user
from graphopt.backends.lower.step import (
    Context,
    Kernel,
    KernelSource,
    LoadTransform,
    Margins,
    Step,
    is_integer_op,
    is_parameter,
    pair,
    rank,
    value_of,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution; ``padding`` is (top, left)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Constants:
    """Where weight, bias and multiplier come from; ``None`` where there is none."""

    weight: fx.Node
    bias: fx.Node | None
    multiplier: fx.Node | None = None


def _name(function: Any) -> str:
    return str(function.attrs["global_symbol"])


class ConvolutionStep(Step):
    """One convolution kernel, its epilogue included."""

    whole_dots = True

    def __init__(
        self,
        nodes: list[fx.Node],
        x: fx.Node,
        constants: Constants,
        window: Window,
        epilogue: Epilogue,
        x_zero_point: int = 0,
        residual: fx.Node | None = None,
    ) -> None:
        super().__init__(nodes, [x] if residual is None else [x, residual], nodes[-1])
        self.constants = constants
        self.window = window
        self.x_zero_point = x_zero_point
        self.epilogue = epilogue

    def margins(self, index: int) -> Margins:
        if index != 0 or rank(self.inputs[0]) != 4:
            return Margins()
        height, width = (int(size) for size in value_of(self.inputs[0]).shape[2:])
        out_height, out_width = (int(size) for size in value_of(self.nodes[0]).shape[2:])
        (kh, kw), (sh, sw), (dh, dw) = self.window.kernel, self.window.stride, self.window.dilation
        top, left = self.window.padding
        bottom = (out_height - 1) * sh - top + (kh - 1) * dh - (height - 1)
        right = (out_width - 1) * sw - left + (kw - 1) * dw - (width - 1)
        return Margins(top, max(0, bottom), left, max(0, right))

    def fill(self, index: int) -> int:
        return self.x_zero_point if index == 0 else 0

    def workload(self, inputs: list[Layout], output: Layout) -> Conv2d:
        """What the kernel computes on these layouts."""
        return Conv2d(
            x=inputs[0],
            y=output,
            kernel=self.window.kernel,
            stride=self.window.stride,
            padding=self.window.padding,
            dilation=self.window.dilation,
            groups=self.window.groups,
            x_zero_point=self.x_zero_point,
            epilogue=self.epilogue,
            residual=inputs[1] if len(inputs) > 1 else None,
        )

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        workload = self.workload(inputs, output)
        weight, bias, multiplier = self.arrays(context, workload)
        if output.order == "planar":
            return _sparse(context, workload, weight, bias, multiplier)
        if is_depthwise(workload):
            function = depthwise(workload, context.isa, context.threads)
            packed = pack_depthwise(workload, context.isa, weight, bias, multiplier)
            return Kernel(_name(function), function, tuple(packed), workload.macs)
        if multiplier is not None:
            workload = rounds_in_range(workload, weight, bias, multiplier)
        if _is_winograd(context, workload, weight, bias):
            return _winograd(context, workload, weight, bias, multiplier)
        choice = context.choices.get(workload_key(workload))
        if choice is not None and not fits(workload, context.isa, choice):
            choice = None
        function = conv2d(workload, context.isa, context.threads, choice)
        packed = pack_conv2d(workload, context.isa, weight, bias, multiplier, choice)
        return Kernel(
            _name(function), function, tuple(packed), workload.macs, workload, form="dense"
        )

    def weight(self, context: Context, workload: Conv2d) -> Array:
        """The weight as OIHW."""
        return self.arrays(context, workload)[0]

    def arrays(
        self, context: KernelSource, workload: Conv2d
    ) -> tuple[Array, Array | None, Array | None]:
        """Weight as OIHW, bias, multiplier."""
        weight = context.array(self.constants.weight)
        weight = weight.reshape(*weight.shape[:2], *workload.kernel)
        bias, multiplier = (
            None if node is None else context.array(node)
            for node in (self.constants.bias, self.constants.multiplier)
        )
        return weight, bias, multiplier


def _is_winograd(context: Context, workload: Conv2d, weight: Array, bias: Array | None) -> bool:
    if not is_winograd(workload, context.isa, context.threads, sums_fit=True):
        return False
    return workload.x.dtype == "float32" or sums_fit(weight, bias)


def _winograd(
    context: Context,
    workload: Conv2d,
    weight: Array,
    bias: Array | None,
    multiplier: Array | None,
) -> Kernel:
    isa, threads = context.isa, context.threads
    function = winograd(workload, isa, threads)
    transform = weight_transform(workload, isa, threads)
    size = plan_winograd(workload, isa, threads).packed_weights
    dtype = "int32" if workload.x.dtype == "uint8" else "float32"
    return Kernel(
        _name(function),
        function,
        tuple(pack_winograd(workload, isa, threads, weight, bias, multiplier)),
        workload.macs,
        load_transform=LoadTransform(_name(transform), transform, size, dtype),
        form="winograd",
    )


def _sparse(
    context: Context,
    workload: Conv2d,
    weight: Array,
    bias: Array | None,
    multiplier: Array | None,
) -> Kernel:
    isa = context.isa
    if multiplier is not None:
        workload = rounds_in_range(workload, weight, bias, multiplier)
    function = sparse(workload, isa, context.threads)
    packed = pack_sparse(plan_sparse(workload, isa), weight, bias, multiplier, isa.flips)
    return Kernel(_name(function), function, tuple(packed), workload.macs, form="sparse")


class BatchNormStep(ConvolutionStep):
    """``y = x * s + (beta - mean * s)`` with ``s = gamma / sqrt(variance + eps)``, as a depthwise 1 x 1 convolution."""

    def __init__(self, nodes: list[fx.Node], epilogue: Epilogue) -> None:
        arguments = ops.bind(nodes[0])
        x = arguments["input"]
        channels = int(value_of(x).shape[1])
        statistics = Constants(arguments["running_var"], arguments["running_mean"])
        super().__init__(nodes, x, statistics, Window(groups=channels), epilogue)
        self._affine = arguments["weight"], arguments["bias"], float(arguments["eps"])

    def arrays(
        self, context: KernelSource, workload: Conv2d
    ) -> tuple[Array, Array | None, Array | None]:
        gamma, beta, epsilon = self._affine
        variance = context.array(self.constants.weight).astype(np.float64)
        assert self.constants.bias is not None
        mean = context.array(self.constants.bias).astype(np.float64)
        scale = 1.0 / np.sqrt(variance + epsilon)
        if gamma is not None:
            scale = scale * context.array(gamma)
        shift = -mean * scale if beta is None else context.array(beta) - mean * scale
        weight = scale.astype(np.float32).reshape(-1, 1, 1, 1)
        return weight, shift.astype(np.float32), None


def _is_constant(*nodes: Any) -> bool:
    return all(node is None or (isinstance(node, fx.Node) and is_parameter(node)) for node in nodes)


def select_float(node: fx.Node) -> Step | None:
    """``aten.conv2d``, ``aten.linear``, an unfolded ``aten.batch_norm`` of float32, with residual sum and activation."""
    if value_of(node).dtype != torch.float32:
        return None
    if ops.is_op(node, "conv2d", "conv2d_same"):
        return _float_convolution(node)
    if ops.is_op(node, "linear"):
        return _float_linear(node)
    if ops.is_op(node, "batch_norm"):
        return _batch_norm(node)
    return None


def _float_convolution(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    if rank(node) != 4 or not _is_constant(a["weight"], a["bias"]):
        return None
    kernel = pair([int(size) for size in value_of(a["weight"]).shape[2:]])
    dilation = pair(a["dilation"])
    padding = _padding(a["padding"], kernel, dilation)
    x, (top, left) = unpadded(a["input"])
    padding = padding[0] + top, padding[1] + left
    window = Window(kernel, pair(a["stride"]), padding, dilation, int(a["groups"]))
    constants = Constants(a["weight"], a["bias"])
    return _with_float_epilogue(node, x, constants, window)


def unpadded(x: fx.Node) -> tuple[fx.Node, tuple[int, int]]:
    """What a zero padding reads and its (top, left): the margins of a layout take its place."""
    if not ops.is_op(x, "pad") or rank(x) != 4:
        return x, (0, 0)
    a = ops.bind(x)
    pads = [*a["pad"], 0, 0, 0, 0][:4]
    left, _, top, _ = pads
    spatial = len(a["pad"]) <= 4 and all(isinstance(pad, int) and pad >= 0 for pad in pads)
    if a.get("mode", "constant") != "constant" or a.get("value") not in (None, 0) or not spatial:
        return x, (0, 0)
    return a["self"], (top, left)


def _padding(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """(top, left); "same" puts the odd element at the end, as torch does."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    return pair(padding)


def _with_float_epilogue(
    node: fx.Node, x: fx.Node, constants: Constants, window: Window
) -> ConvolutionStep:
    nodes, residual, epilogue = _float_epilogue(node)
    return ConvolutionStep(nodes, x, constants, window, epilogue, residual=residual)


def _float_epilogue(
    node: fx.Node, adds: bool = True
) -> tuple[list[fx.Node], fx.Node | None, Epilogue]:
    """What follows a layer's float32 output: the nodes to swallow, itself the first, and the other operand of a sum."""
    nodes, residual = [node], None
    add = sole_user(node) if adds else None
    if add is not None and ops.is_op(add, "add") and ops.bind(add)["alpha"] == 1:
        residual = later_residual(node, add)
        if residual is not None:
            nodes.append(add)
    swallowed, activation = following_activation(nodes[-1])
    epilogue = Epilogue(float_residual=residual is not None, activation=activation)
    return [*nodes, *swallowed], residual, epilogue


def _float_linear(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    if not _is_constant(a["weight"], a["bias"]) or rank(node) < 2:
        return None
    constants = Constants(a["weight"], a["bias"])
    return _plain_rows(_with_float_epilogue(node, a["input"], constants, Window()))


def _plain_rows(step: Step) -> Step:
    """Linear layers of more than two dimensions have their channels last: they read and write plain tensors."""
    if rank(step.output) != 2:
        step.plain_inputs = [True] * len(step.inputs)
        step.plain_output = True
    return step


def _batch_norm(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    constant = _is_constant(a["weight"], a["bias"], a["running_mean"], a["running_var"])
    if rank(node) != 4 or a["training"] or a["running_mean"] is None or not constant:
        return None
    swallowed, activation = following_activation(node)
    return BatchNormStep([node, *swallowed], Epilogue(activation=activation))


def select_integer(node: fx.Node) -> Step | None:
    """``graphopt::conv2d``, ``graphopt::linear`` and their dequantizing forms."""
    if not is_integer_op(node):
        return None
    namespace = torch.ops.graphopt
    if node.target in (namespace.conv2d.default, namespace.conv2d_dequantize.default):
        a = ops.bind(node)
        kernel = pair([int(size) for size in value_of(a["weight"]).shape[2:]])
        top, left, *_ = a["padding"]
        window = Window(kernel, pair(a["stride"]), (top, left), pair(a["dilation"]), a["groups"])
        return _with_integer_epilogue(node, a, window)
    if node.target in (namespace.linear.default, namespace.linear_dequantize.default):
        return _plain_rows(_with_integer_epilogue(node, ops.bind(node), Window()))
    return None


def _with_integer_epilogue(node: fx.Node, a: dict[str, Any], window: Window) -> Step:
    constants = Constants(a["weight"], a["bias"], a["multiplier"])
    if "y_zero_point" not in a:
        # Only linear layers: the depthwise kernels add nothing to a dequantized sum.
        is_linear = node.target == torch.ops.graphopt.linear_dequantize.default
        nodes, residual, epilogue = _float_epilogue(node, adds=is_linear)
        zero_point = a["x_zero_point"]
        return ConvolutionStep(nodes, a["x"], constants, window, epilogue, zero_point, residual)
    nodes, residual = [node], None
    epilogue = Epilogue(requantize=Requantize(a["y_zero_point"], a["qmin"], a["qmax"]))
    add = sole_user(node)
    if add is not None and add.target == torch.ops.graphopt.add.default and rank(node) == 4:
        residual = later_residual(node, add)
        if residual is not None:
            nodes.append(add)
            epilogue = replace(epilogue, residual_add=quantized_add(add, node))
    return ConvolutionStep(nodes, a["x"], constants, window, epilogue, a["x_zero_point"], residual)


def quantized_add(add: fx.Node, first: fx.Node) -> QuantizedAdd:
    """The parameters of ``graphopt::add`` with ``first`` as operand a."""
    v = ops.bind(add)
    a, b = ("a", "b") if v["a"] is first else ("b", "a")
    return QuantizedAdd(
        a_multiplier=v[f"{a}_multiplier"],
        b_multiplier=v[f"{b}_multiplier"],
        shift=v["shift"],
        a_zero_point=v[f"{a}_zero_point"],
        b_zero_point=v[f"{b}_zero_point"],
        zero_point=v["y_zero_point"],
        qmin=v["qmin"],
        qmax=v["qmax"],
    )
