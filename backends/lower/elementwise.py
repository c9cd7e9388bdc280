"""Pooling, sums, products, concatenation and changes of element type as steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cpu.concat import concat
from graphopt.backends.cpu.planar import as_map, reorder
from graphopt.backends.cpu.pointwise import add, mul
from graphopt.backends.cpu.pool import pack_pool2d, pool2d
from graphopt.backends.cpu.workload import (
    Activation,
    Add,
    Concat,
    Convert,
    Layout,
    Mul,
    Pool2d,
    QuantizedAdd,
    Requantize,
)
from graphopt.backends.lower.convolution import quantized_add
from graphopt.backends.lower.fusing import activation_of, following_activation
from graphopt.backends.lower.step import (
    Context,
    Kernel,
    KernelSource,
    Step,
    is_integer_op,
    pair,
    rank,
    value_of,
)


def _kernel(function: Any, constants: tuple[Any, ...] = ()) -> Kernel:
    return Kernel(str(function.attrs["global_symbol"]), function, constants)


class ConvertStep(Step):
    """Quantize, dequantize, requantize, a lone activation: element by element, layouts changed on the way."""

    def __init__(self, nodes: list[fx.Node], x: fx.Node, **parameters: Any) -> None:
        super().__init__(nodes, [x], nodes[-1])
        self.parameters = parameters

    def workload(self, inputs: list[Layout], output: Layout) -> Convert:
        """What the kernel computes on these layouts."""
        x_order, y_order = (
            "nchw" if plain and not self.is_rows else "nhwc"
            for plain in (self.plain_inputs[0], self.plain_output)
        )
        return Convert(inputs[0], output, x_order, y_order, **self.parameters)

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        return context.convert(self.workload(inputs, output))


class PoolStep(Step):
    """Maximum or average over windows."""

    def __init__(self, node: fx.Node, x: fx.Node, multiplier: float, **parameters: Any) -> None:
        super().__init__([node], [x], node)
        self.multiplier = multiplier
        self.parameters = parameters

    def workload(self, inputs: list[Layout], output: Layout) -> Pool2d:
        """What the kernel computes on these layouts."""
        return Pool2d(x=inputs[0], y=output, **self.parameters)

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        workload = self.workload(inputs, output)
        function = pool2d(workload, context.isa, context.threads)
        return _kernel(function, tuple(pack_pool2d(workload, self.multiplier)))


class AddStep(Step):
    """Sum of two tensors of one shape."""

    def __init__(
        self,
        nodes: list[fx.Node],
        inputs: list[fx.Node],
        parameters: QuantizedAdd | None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(nodes, inputs, nodes[-1])
        self.parameters = parameters
        self.activation = activation

    def workload(self, inputs: list[Layout], output: Layout) -> Add:
        """What the kernel computes on these layouts."""
        return Add(inputs[0], inputs[1], output, self.parameters, self.activation)

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        if output.order == "planar":
            inputs, output = [as_map(layout) for layout in inputs], as_map(output)
        return _kernel(add(self.workload(inputs, output), context.isa, context.threads))


class MulStep(Step):
    """Product of a map and a tensor of its shape or of one value a channel."""

    def __init__(
        self, nodes: list[fx.Node], inputs: list[fx.Node], activation: Activation | None
    ) -> None:
        super().__init__(nodes, inputs, nodes[-1])
        self.activation = activation

    def workload(self, inputs: list[Layout], output: Layout) -> Mul:
        """What the kernel computes on these layouts."""
        return Mul(inputs[0], inputs[1], output, self.activation)

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        return _kernel(mul(self.workload(inputs, output), context.isa, context.threads))


class ConcatStep(Step):
    """Concatenation along channels."""

    def workload(self, inputs: list[Layout], output: Layout) -> Concat:
        """What the kernel computes on these layouts."""
        return Concat(tuple(inputs), output, (None,) * len(inputs))

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        return _kernel(concat(self.workload(inputs, output), context.isa, context.threads))


def select_integer(node: fx.Node) -> Step | None:
    """The steps of ``graphopt::`` operators other than convolutions."""
    if not is_integer_op(node):
        return None
    namespace = torch.ops.graphopt
    a = ops.bind(node)
    if node.target == namespace.quantize.default:
        inverse = float(torch.tensor(1.0) / torch.tensor(a["scale"], dtype=torch.float32))
        requantize = Requantize(a["zero_point"], a["qmin"], a["qmax"])
        return ConvertStep([node], a["x"], scale=inverse, requantize=requantize)
    if node.target == namespace.dequantize.default:
        swallowed, activation = following_activation(node)
        nodes, zero_point = [node, *swallowed], a["zero_point"]
        fused = {} if activation is None else {"activation": activation}
        return ConvertStep(nodes, a["q"], scale=a["scale"], x_zero_point=zero_point, **fused)
    if node.target == namespace.requantize.default:
        requantize = Requantize(a["y_zero_point"], a["qmin"], a["qmax"])
        return ConvertStep(
            [node],
            a["q"],
            scale=a["multiplier"],
            x_zero_point=a["x_zero_point"],
            requantize=requantize,
        )
    if node.target == namespace.add.default and _same_shapes(node, a["a"], a["b"]):
        return AddStep([node], [a["a"], a["b"]], quantized_add(node, a["a"]))
    return _integer_pool(node, a)


def _integer_pool(node: fx.Node, a: dict[str, Any]) -> Step | None:
    namespace = torch.ops.graphopt
    if node.target == namespace.max_pool2d.default:
        return _max_pool(node, a["q"], a)
    if node.target == namespace.avg_pool2d.default:
        return PoolStep(
            node,
            a["q"],
            a["multiplier"],
            kind="average",
            kernel=pair(a["kernel"]),
            stride=pair(a["stride"] or a["kernel"]),
            padding=pair(a["padding"]),
            count_include_pad=a["count_include_pad"],
            divisor_override=a["divisor_override"],
            x_zero_point=a["x_zero_point"],
            requantize=Requantize(a["y_zero_point"], a["qmin"], a["qmax"]),
        )
    if node.target == namespace.global_avg_pool.default:
        requantize = Requantize(a["y_zero_point"], a["qmin"], a["qmax"])
        return _global_pool(node, a["q"], a["multiplier"], a["x_zero_point"], requantize)
    if node.target == namespace.global_avg_pool_dequantize.default:
        return _global_pool(node, a["q"], a["multiplier"], a["x_zero_point"])
    return None


def _max_pool(node: fx.Node, x: fx.Node, a: dict[str, Any]) -> Step:
    kernel = pair(a.get("kernel", a.get("kernel_size")))
    return PoolStep(
        node,
        x,
        1.0,
        kind="max",
        kernel=kernel,
        stride=pair(a["stride"] or kernel),
        padding=pair(a["padding"]),
        dilation=pair(a["dilation"]),
    )


def _global_pool(
    node: fx.Node,
    x: fx.Node,
    multiplier: float,
    x_zero_point: int = 0,
    requantize: Requantize | None = None,
) -> Step:
    height, width = (int(size) for size in value_of(x).shape[2:])
    return PoolStep(
        node,
        x,
        multiplier,
        kind="average",
        kernel=(height, width),
        stride=(height, width),
        x_zero_point=x_zero_point,
        requantize=requantize,
    )


def select_float(node: fx.Node) -> Step | None:
    """Float pooling, sums, products and activations of maps (rank 4)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return None
    activation = activation_of(node)
    if activation is not None and value.dim() == 4:
        return ConvertStep([node], ops.bind(node)["self"], activation=activation)
    if ops.is_op(node, "add", "mul"):
        return _float_binary(node)
    return _float_pool(node)


def _float_binary(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    x, other = a["self"], a["other"]
    if not (isinstance(x, fx.Node) and isinstance(other, fx.Node)) or rank(node) != 4:
        return None
    if x.op == "get_attr" or other.op == "get_attr":
        return None
    if any(rank(v) != 4 or value_of(v).dtype != torch.float32 for v in (x, other)):
        return None
    if ops.is_op(node, "mul") and not _same_shapes(node, x):
        x, other = other, x
    same = _same_shapes(node, x, other)
    per_channel = _same_shapes(node, x) and _is_one_value_a_channel(node, other)
    swallowed, following = following_activation(node)
    nodes = [node, *swallowed]
    if ops.is_op(node, "add") and same and a["alpha"] == 1:
        return AddStep(nodes, [x, other], None, following)
    if ops.is_op(node, "mul") and (same or per_channel):
        return MulStep(nodes, [x, other], following)
    return None


def _is_one_value_a_channel(node: fx.Node, scale: fx.Node) -> bool:
    n, c, h, w = (str(size) for size in value_of(scale).shape)
    want_n, want_c, *_ = (str(size) for size in value_of(node).shape)
    return (n, c, h, w) == (want_n, want_c, "1", "1")


def _float_pool(node: fx.Node) -> Step | None:
    if rank(node) not in (2, 4):
        return None
    a = ops.bind(node) if ops.info(node) is not None else {}
    x = a.get("self")
    if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], torch.Tensor) or rank(x) != 4:
        return None
    if ops.is_op(node, "max_pool2d"):
        return _max_pool(node, x, a)
    if ops.is_op(node, "avg_pool2d"):
        return PoolStep(
            node,
            x,
            1.0,
            kind="average",
            kernel=pair(a["kernel_size"]),
            stride=pair(a["stride"] or a["kernel_size"]),
            padding=pair(a["padding"]),
            count_include_pad=a["count_include_pad"],
            divisor_override=a["divisor_override"] or 0,
        )
    if ops.is_op(node, "adaptive_avg_pool2d") and list(a["output_size"]) == [1, 1]:
        return _global_pool(node, x, 1.0)
    if (
        ops.is_op(node, "mean")
        and sorted(d % 4 for d in a["dim"] or ()) == [2, 3]
        and not a.get("dtype")
    ):
        return _global_pool(node, x, 1.0)
    return None


def select_concat(node: fx.Node) -> Step | None:
    """``cat`` of maps along channels, bytes or floats."""
    if not ops.is_op(node, "concat") or rank(node) != 4:
        return None
    a = ops.bind(node)
    dtypes = (torch.uint8, torch.int8, torch.float32)
    if a["dim"] not in (1, -3) or value_of(node).dtype not in dtypes:
        return None
    inputs = list(a["tensors"])
    alike = all(v.op != "get_attr" and value_of(v).dtype == value_of(node).dtype for v in inputs)
    return ConcatStep([node], inputs, node) if alike and all(rank(v) == 4 for v in inputs) else None


def reordered(x: Layout, y: Layout, context: Context) -> Kernel:
    """The kernel between NHWC and planar order."""
    return _kernel(reorder(x, y, context.isa, context.threads))


def relayout(x: Layout, y: Layout, x_order: str, y_order: str, context: KernelSource) -> Kernel:
    """The kernel that only moves: same elements, another layout or order."""
    return context.convert(Convert(x, y, x_order, y_order))


def _same_shapes(*nodes: fx.Node) -> bool:
    shapes = {tuple(str(size) for size in value_of(node).shape) for node in nodes}
    return len(shapes) == 1
