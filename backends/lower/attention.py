"""What transformers are made of as steps on plain tensors: products, softmax, norms, element-wise, means over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cpu.attention import attention
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.layer_norm import layer_norm, pack_layer_norm
from graphopt.backends.cpu.matmul import matmul
from graphopt.backends.cpu.softmax import softmax
from graphopt.backends.cpu.tokens import Attention, LayerNorm, Matmul, Softmax, Strided
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.lower.elementwise import AddStep, ConvertStep, MulStep, PoolStep
from graphopt.backends.lower.fusing import activation_of, following_activation, sole_user
from graphopt.backends.lower.step import Context, Kernel, Step, rank, value_of
from graphopt.backends.lower.views import (
    View,
    contiguous_strides,
    shape_hints,
    view_of,
    whole,
    written_view,
)
from graphopt.edit import Build
from graphopt.program import Program

aten = torch.ops.aten
_MASK = 3  # its place among attention's operands


def spell_masks(program: Program) -> Program:
    """The program with the boolean masks of attention as float ones: 0 where true, else -inf."""
    masked = [
        node.name
        for node in program.graph.nodes
        if ops.is_op(node, "attention") and _is_boolean(ops.bind(node)["attn_mask"])
    ]
    if not masked:
        return program
    program = program.clone()
    for node in list(program.graph.nodes):
        if node.name in masked:
            mask = ops.bind(node)["attn_mask"]
            made = Build(program, node, [node]).call(aten.where.Scalar, mask, 0.0, -math.inf)
            index = ops.position(node, "attn_mask")
            if index < len(node.args):
                node.update_arg(index, made)
            else:
                node.update_kwarg("attn_mask", made)
    return program


def _is_boolean(node: Any) -> bool:
    return isinstance(node, fx.Node) and value_of(node).dtype == torch.bool


class RowsStep(Step):
    """A step that reads and writes plain tensors."""

    def __init__(self, nodes: list[fx.Node], inputs: list[fx.Node], output: fx.Node) -> None:
        super().__init__(nodes, inputs, output)
        self.plain_inputs = [True] * len(inputs)
        self.plain_output = True


class SoftmaxStep(RowsStep):
    """Softmax over the last axis."""

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        function = softmax(Softmax(inputs[0], output), context.isa, context.threads)
        return Kernel(str(function.attrs["global_symbol"]), function)


class LayerNormStep(RowsStep):
    """Layer norm over the last axis, with or without weight and bias."""

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        a = ops.bind(self.nodes[0])
        workload = LayerNorm(inputs[0], output, float(a["eps"]))
        weight, bias = (
            None if a[name] is None else context.array(a[name]) for name in ("weight", "bias")
        )
        function = layer_norm(workload, context.isa, context.threads)
        packed = pack_layer_norm(workload, weight, bias)
        return Kernel(str(function.attrs["global_symbol"]), function, packed)


@dataclass(frozen=True)
class Product:
    """A matmul or an attention before its layouts are known: ``build(operands, y, isa, threads)`` is the kernel."""

    lead: tuple[int | None, ...]
    operands: tuple[fx.Node, ...]
    build: Callable[[list[Strided], Strided, Isa, int], tuple[Any, int]]


class ProductStep(RowsStep):
    """A product whose operands and result are views of plain tensors."""

    def __init__(
        self,
        nodes: list[fx.Node],
        product: Product,
        views: Sequence[View],
        strides: tuple[int, ...],
    ) -> None:
        super().__init__(nodes, [view.base for view in views], nodes[-1])
        self.product = product
        self.views = views
        self.strides = strides

    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        pairs = zip(inputs, self.views, strict=True)
        operands = [Strided(layout, view.strides, view.offset) for layout, view in pairs]
        y = Strided(output, self.strides)
        function, macs = self.product.build(operands, y, context.isa, context.threads)
        return Kernel(str(function.attrs["global_symbol"]), function, macs=macs)


def select(node: fx.Node) -> Step | None:
    """The step of a float32 operator whose sizes are known, except for the batch."""
    if ops.info(node) is None or value_of(node).dtype != torch.float32:
        return None
    if ops.is_op(node, "attention"):
        return _attention(node)
    if ops.is_op(node, "matmul", "bmm", "mm"):
        return _matmul(node)
    if ops.is_op(node, "softmax"):
        return _softmax(node)
    if ops.is_op(node, "layer_norm"):
        return _layer_norm(node)
    if rank(node) == 4 or not _is_static(node):
        return None
    return _mean(node) if ops.is_op(node, "mean") else _elementwise(node)


def _mean(node: fx.Node) -> Step | None:
    """The mean over tokens: a pool over all of the rows."""
    a = ops.bind(node)
    x = a["self"]
    if rank(x) != 3 or list(a["dim"]) not in ([1], [-2]) or value_of(x).dtype != torch.float32:
        return None
    if not _is_static(x):
        return None
    window = (1, int(value_of(x).shape[1]))
    step = PoolStep(node, x, 1.0, kind="average", kernel=window, stride=window)
    step.plain_inputs, step.plain_output = [True], True
    return step


def _elementwise(node: fx.Node) -> Step | None:
    """Activations, and sums and products of equal shapes, of tensors that are no maps and no vectors."""
    if rank(node) < 3:
        return None
    activation = activation_of(node)
    if activation is not None:
        return ConvertStep([node], ops.bind(node)["self"], activation=activation)
    if not ops.is_op(node, "add", "mul"):
        return None
    a = ops.bind(node)
    operands = [a["self"], a["other"]]
    if not all(isinstance(v, fx.Node) for v in operands) or a.get("alpha", 1) != 1:
        return None
    if any(_shape(v) != _shape(node) or value_of(v).dtype != torch.float32 for v in operands):
        return None
    swallowed, following = following_activation(node)
    nodes = [node, *swallowed]
    if ops.is_op(node, "add"):
        return AddStep(nodes, operands, None, following)
    return MulStep(nodes, operands, following)


def _is_static(node: fx.Node) -> bool:
    """True where at most the first size is dynamic, and there are elements."""
    sizes = value_of(node).shape
    known = not any(isinstance(size, torch.SymInt) for size in sizes[1:])
    return known and all(size != 0 for size in shape_hints(node))


def _softmax(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    x = a["self"]
    last = a["dim"] in (-1, rank(node) - 1)
    if rank(node) < 2 or not last or value_of(x).dtype != torch.float32 or not _is_static(node):
        return None
    return SoftmaxStep([node], [x], node)


def _layer_norm(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    constant = all(a[name] is None or a[name].op == "get_attr" for name in ("weight", "bias"))
    if rank(node) < 2 or len(a["normalized_shape"]) != 1 or not constant or not _is_static(node):
        return None
    return LayerNormStep([node], [a["input"]], node)


def _matmul(node: fx.Node) -> Step | None:
    left, right = list(ops.bind(node).values())[:2]
    if min(rank(left), rank(right)) < 2:
        return None
    swallowed, scale = _following_scale(node)
    *lead, rows, columns = _sizes(node)
    depth = _sizes(left)[-1]
    if rows is None or columns is None or depth is None:
        return None

    def build(operands: list[Strided], y: Strided, isa: Isa, threads: int) -> tuple[Any, int]:
        a, b = operands
        workload = Matmul(a, b, y, tuple(lead), rows, depth, columns, scale)
        return matmul(workload, isa, threads), workload.macs

    return _product([node, *swallowed], Product(tuple(lead), (left, right), build))


def _following_scale(node: fx.Node) -> tuple[list[fx.Node], float]:
    """The product with, or division by, a number that alone reads ``node``."""
    user = sole_user(node)
    if user is None or not ops.is_op(user, "mul", "div") or user.args[0] is not node:
        return [], 1.0
    factor = user.args[1]
    if not isinstance(factor, int | float) or factor == 0 or user.kwargs:
        return [], 1.0
    return [user], float(factor) if ops.is_op(user, "mul") else 1.0 / float(factor)


def _attention(node: fx.Node) -> Step | None:
    a = ops.bind(node)
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    if a["dropout_p"] or a["enable_gqa"] or rank(node) < 3:
        return None
    *lead, rows, columns = _sizes(node)
    depth, keys = _sizes(query)[-1], _sizes(key)[-2]
    if rows is None or columns is None or depth is None or keys is None:
        return None
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(depth)

    def build(operands: list[Strided], y: Strided, isa: Isa, threads: int) -> tuple[Any, int]:
        q, k, v, *rest = operands
        workload = Attention(
            query=q,
            key=k,
            value=v,
            y=y,
            lead=tuple(lead),
            rows=rows,
            depth=depth,
            keys=keys,
            columns=columns,
            scale=float(scale),
            mask=rest[0] if rest else None,
            causal=bool(a["is_causal"]),
        )
        return attention(workload, isa, threads), workload.macs

    operands = (query, key, value) if mask is None else (query, key, value, mask)
    return _product([node], Product(tuple(lead), operands, build))


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in value_of(node).shape]


def _sizes(node: fx.Node) -> list[int | None]:
    """The sizes; None for a dynamic one."""
    return [None if isinstance(s, torch.SymInt) else int(s) for s in value_of(node).shape]


def _product(nodes: list[fx.Node], product: Product) -> Step | None:
    """The step that reads and writes in place as much as it can, or None where sizes are dynamic or types differ."""
    for node in product.operands:
        if rank(node) < 2 or not _is_static(node) or value_of(node).dtype != torch.float32:
            return None
    result = nodes[-1]
    swallowed, strides = written_view(result)
    targets = [(swallowed, strides), ([], contiguous_strides(shape_hints(result)))]
    for views, out_strides in targets:
        output = views[-1] if views else result
        if not _is_static(output) or not _same_batch(output, result, product.lead):
            continue
        operands = [_operand(node, output, result, i) for i, node in enumerate(product.operands)]
        found = [view for view in operands if view is not None]
        if len(found) == len(operands):
            return ProductStep([*nodes, *views], product, found, out_strides)
    return None


def _same_batch(output: fx.Node, result: fx.Node, lead: tuple[int | None, ...]) -> bool:
    """A dynamic leading axis must be the first axis of what the kernel writes."""
    return None not in lead or _leading(output) == _leading(result)


def _leading(node: fx.Node) -> str:
    return str(value_of(node).shape[0])


def _operand(node: fx.Node, output: fx.Node, result: fx.Node, index: int) -> View | None:
    """The operand as the kernel reads it, its strides those of the result's leading axes.

    The kernel's result has the first axis of its first argument; a dynamic one is the same in all of them.
    """
    for view in (view_of(node), whole(node)):
        dynamic = isinstance(value_of(view.base).shape[0], torch.SymInt)
        alike = _leading(view.base) == _leading(output)
        if not _is_static(view.base) or (not alike and (index == 0 or dynamic)):
            continue
        strides = _broadcast(node, view.strides, result)
        if index == _MASK:
            strides = (*strides[:-2], *_repeated(node, strides))
        if index != _MASK or strides[-1] in (0, 1):
            return View(view.base, strides, view.offset)
    return None


def _repeated(mask: fx.Node, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a mask's rows and columns, 0 where there is one for all."""
    pairs = zip(shape_hints(mask)[-2:], strides[-2:], strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def _broadcast(node: fx.Node, strides: tuple[int, ...], result: fx.Node) -> tuple[int, ...]:
    """Strides along the axes of the result, 0 where the operand repeats; the last two are the operand's own."""
    sizes, wanted = shape_hints(node), shape_hints(result)
    missing = len(wanted) - len(sizes)
    lead = [
        0 if axis < missing or sizes[axis - missing] == 1 else strides[axis - missing]
        for axis in range(len(wanted) - 2)
    ]
    return (*lead, *strides[-2:])
