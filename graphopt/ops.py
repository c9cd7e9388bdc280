"""The op table: one declaration per ATen operator of what passes and backends need to know about it.

``info(node)`` answers for a node, ``arguments(node)`` binds a call to its schema so that code asks for ``"stride"``
and never for ``args[3]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import graphopt.fake_forms  # noqa: F401 - registers them

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """What is known of one operator.

    ``targets[0]`` is the overload that ``build`` emits; all of them are matched. ``inputs`` names the arguments that
    carry activations, ``weight`` and ``bias`` those that carry parameters. ``out_channels``/``in_channels`` are the
    weight's axes (``in_channels`` is per group); ``channel_axis`` is the activations' (-1 for linear layers).
    ``quantizable``: an integer kernel exists. ``same_qparams``: the output only selects or moves input elements, so
    both sides share one scale. ``elementwise``: output[i] depends on input[i] only. ``commutative``: the first two
    arguments may be swapped.
    """

    name: str
    kind: str
    targets: tuple[Any, ...]
    inputs: tuple[str, ...] = ("self",)
    weight: str | None = None
    bias: str | None = None
    out_channels: int = 0
    in_channels: int = 1
    channel_axis: int = 1
    quantizable: bool = False
    same_qparams: bool = False
    elementwise: bool = False
    commutative: bool = False
    macs: Callable[[fx.Node], int] | None = None


def _shape(value: Any) -> list[int]:
    """Shape of a node's value, a symbolic size counted as its hint."""
    return [_hint(size) for size in value.meta["val"].shape]


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        return int(
            size.node.hint
            if size.node.has_hint()
            else size.node.shape_env.size_hint(size.node.expr)
        )
    return int(size)


def _convolution_macs(node: fx.Node) -> int:
    weight = _shape(bind(node)["weight"])
    return math.prod(_shape(node)) * math.prod(weight[1:])


def _transposed_macs(node: fx.Node) -> int:
    arguments = bind(node)
    return math.prod(_shape(arguments["input"])) * math.prod(_shape(arguments["weight"])[1:])


def _linear_macs(node: fx.Node) -> int:
    return math.prod(_shape(node)) * _shape(bind(node)["weight"])[-1]


def _matmul_macs(node: fx.Node) -> int:
    first = next(iter(bind(node).values()))
    return math.prod(_shape(node)) * _shape(first)[-1]


def _addmm_macs(node: fx.Node) -> int:
    return math.prod(_shape(node)) * _shape(bind(node)["mat1"])[-1]


def _attention_macs(node: fx.Node) -> int:
    arguments = bind(node)
    query, key = _shape(arguments["query"]), _shape(arguments["key"])
    return 2 * math.prod(query) * key[-2]


def _convolution(name: str, target: Any, quantizable: bool = False) -> Op:
    return Op(
        name,
        "convolution",
        (target,),
        ("input",),
        "weight",
        "bias",
        quantizable=quantizable,
        macs=_convolution_macs,
    )


def _transposed(name: str, target: Any) -> Op:
    return Op(
        name,
        "transposed_convolution",
        (target,),
        ("input",),
        "weight",
        "bias",
        out_channels=1,
        in_channels=0,
        macs=_transposed_macs,
    )


def _activation(name: str, target: Any, quantizable: bool = False) -> Op:
    return Op(name, "activation", (target,), quantizable=quantizable, elementwise=True)


def _unary(name: str, target: Any) -> Op:
    return Op(name, "elementwise", (target,), elementwise=True)


def _binary(name: str, *targets: Any, quantizable: bool = False, commutative: bool = True) -> Op:
    return Op(
        name,
        "elementwise",
        targets,
        ("self", "other"),
        quantizable=quantizable,
        elementwise=True,
        commutative=commutative,
    )


def _copy(name: str, *targets: Any, inputs: tuple[str, ...] = ("self",)) -> Op:
    return Op(name, "shape", targets, inputs, quantizable=True, same_qparams=True)


def _norm(name: str, target: Any) -> Op:
    return Op(name, "norm", (target,), ("input",), "weight", "bias")


TABLE: tuple[Op, ...] = (
    _convolution("conv1d", aten.conv1d.default),
    _convolution("conv2d", aten.conv2d.default, quantizable=True),
    _convolution("conv2d_same", aten.conv2d.padding),
    _convolution("conv1d_same", aten.conv1d.padding),
    _convolution("conv3d", aten.conv3d.default),
    _transposed("conv_transpose1d", aten.conv_transpose1d.default),
    _transposed("conv_transpose2d", aten.conv_transpose2d.input),
    _transposed("conv_transpose3d", aten.conv_transpose3d.input),
    Op(
        "linear",
        "linear",
        (aten.linear.default,),
        ("input",),
        "weight",
        "bias",
        channel_axis=-1,
        quantizable=True,
        macs=_linear_macs,
    ),
    Op("matmul", "matmul", (aten.matmul.default,), ("self", "other"), macs=_matmul_macs),
    Op("bmm", "matmul", (aten.bmm.default,), ("self", "mat2"), macs=_matmul_macs),
    Op("mm", "matmul", (aten.mm.default,), ("self", "mat2"), macs=_matmul_macs),
    Op("addmm", "matmul", (aten.addmm.default,), ("self", "mat1", "mat2"), macs=_addmm_macs),
    Op(
        "attention",
        "matmul",
        (aten.scaled_dot_product_attention.default,),
        ("query", "key", "value"),
        macs=_attention_macs,
    ),
    _norm("batch_norm", aten.batch_norm.default),
    _norm("layer_norm", aten.layer_norm.default),
    _norm("group_norm", aten.group_norm.default),
    _norm("instance_norm", aten.instance_norm.default),
    _activation("relu", aten.relu.default, quantizable=True),
    _activation("relu6", aten.relu6.default, quantizable=True),
    _activation("hardtanh", aten.hardtanh.default, quantizable=True),
    _activation("clamp", aten.clamp.default, quantizable=True),
    _activation("clamp_min", aten.clamp_min.default, quantizable=True),
    _activation("leaky_relu", aten.leaky_relu.default),
    _activation("elu", aten.elu.default),
    _activation("sigmoid", aten.sigmoid.default),
    _activation("silu", aten.silu.default),
    _activation("hardsigmoid", aten.hardsigmoid.default),
    _activation("hardswish", aten.hardswish.default),
    _activation("tanh", aten.tanh.default),
    _activation("gelu", aten.gelu.default),
    _activation("mish", aten.mish.default),
    _activation("softplus", aten.softplus.default),
    Op("softmax", "normalizer", (aten.softmax.int,)),
    Op("log_softmax", "normalizer", (aten.log_softmax.int,)),
    _binary("add", aten.add.Tensor, quantizable=True),
    _binary("sub", aten.sub.Tensor, commutative=False),
    _binary("mul", aten.mul.Tensor),
    _binary("div", aten.div.Tensor, commutative=False),
    _unary("neg", aten.neg.default),
    _unary("exp", aten.exp.default),
    _unary("sqrt", aten.sqrt.default),
    _unary("rsqrt", aten.rsqrt.default),
    _unary("abs", aten.abs.default),
    _unary("erf", aten.erf.default),
    _unary("pow", aten.pow.Tensor_Scalar),
    Op("max_pool2d", "pool", (aten.max_pool2d.default,), quantizable=True, same_qparams=True),
    Op("avg_pool2d", "pool", (aten.avg_pool2d.default,), quantizable=True),
    Op("adaptive_avg_pool2d", "pool", (aten.adaptive_avg_pool2d.default,), quantizable=True),
    Op("adaptive_max_pool2d", "pool", (aten.adaptive_max_pool2d.default,)),
    Op("mean", "reduce", (aten.mean.dim,), quantizable=True),
    Op("sum", "reduce", (aten.sum.dim_IntList,)),
    Op(
        "concat",
        "concat",
        (aten.cat.default, aten.concat.default),
        ("tensors",),
        quantizable=True,
        same_qparams=True,
    ),
    Op("stack", "concat", (aten.stack.default,), ("tensors",), same_qparams=True),
    _copy("reshape", aten.reshape.default),
    _copy("view", aten.view.default),
    _copy("flatten", aten.flatten.using_ints),
    _copy("unflatten", aten.unflatten.int),
    _copy("permute", aten.permute.default),
    _copy("transpose", aten.transpose.int),
    _copy("t", aten.t.default),
    _copy("contiguous", aten.contiguous.default),
    _copy("clone", aten.clone.default),
    _copy("alias", aten.alias.default),
    _copy("detach", aten.detach.default),
    _copy("squeeze", aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims),
    _copy("unsqueeze", aten.unsqueeze.default),
    _copy("expand", aten.expand.default),
    _copy("slice", aten.slice.Tensor),
    _copy("select", aten.select.int),
    _copy("split", aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes),
    _copy("chunk", aten.chunk.default),
    _copy("pixel_shuffle", aten.pixel_shuffle.default),
    _copy("pixel_unshuffle", aten.pixel_unshuffle.default),
    _copy("channel_shuffle", aten.channel_shuffle.default),
    _copy("flip", aten.flip.default),
    Op("pad", "pad", (aten.pad.default, aten.constant_pad_nd.default)),
    Op(
        "dropout",
        "dropout",
        (
            aten.dropout.default,
            aten.feature_dropout.default,
            aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default,
        ),
        ("input",),
    ),
    Op("upsample_nearest2d", "resize", (aten.upsample_nearest2d.vec,), ("input",)),
    Op("upsample_bilinear2d", "resize", (aten.upsample_bilinear2d.vec,), ("input",)),
    Op("embedding", "embedding", (aten.embedding.default,), ("indices",), "weight"),
    Op("fake_quantize", "fake_quantize", (aten.fake_quantize_per_tensor_affine.default,)),
    Op(
        "fake_quantize_tensor_qparams",
        "fake_quantize",
        (aten.fake_quantize_per_tensor_affine.tensor_qparams,),
    ),
    Op("fake_quantize_channel", "fake_quantize", (aten.fake_quantize_per_channel_affine.default,)),
)

BY_NAME: dict[str, Op] = {op.name: op for op in TABLE}
_BY_TARGET: dict[Any, Op] = {target: op for op in TABLE for target in op.targets}


def info(node: Any) -> Op | None:
    """The table's row for a node, or None where the operator is not listed (or the node is no call)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    return _BY_TARGET.get(node.target)


def is_op(node: Any, *names: str) -> bool:
    """True where ``node`` is a call of one of the named operators."""
    op = info(node)
    return op is not None and op.name in names


def bind(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by schema name, defaults filled in: ``bind(conv)["stride"]``."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def position(node: fx.Node, argument: str) -> int:
    """Index of a schema argument, to be used with ``node.update_arg``."""
    schema = node.target._schema  # type: ignore[union-attr]
    return next(i for i, a in enumerate(schema.arguments) if a.name == argument)


def masked(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The parameter and the mask of a pruned weight, ``mul(weight, mask)`` with a buffer named ``..._mask``; else None."""
    if not is_op(node, "mul"):
        return None
    pair = node.args[:2]
    if not all(isinstance(value, fx.Node) and value.op == "get_attr" for value in pair):
        return None
    for weight, mask in (pair, pair[::-1]):
        if str(mask.target).endswith("_mask") and not str(weight.target).endswith("_mask"):
            return weight, mask
    return None


def activations(node: fx.Node) -> list[fx.Node]:
    """The nodes that carry a call's activations, in argument order."""
    op = info(node)
    if op is None:
        return list(node.all_input_nodes)
    values = bind(node)
    flat: list[Any] = []
    for name in op.inputs:
        value = values.get(name)
        flat.extend(
            value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        )
    return [value for value in flat if isinstance(value, fx.Node)]


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of a node at its example shapes (0 for operators that have none)."""
    op = info(node)
    if op is not None:
        return op.macs(node) if op.macs is not None else 0
    if getattr(node.target, "namespace", None) == "graphopt" and "weight" in bind(node):
        return math.prod(_shape(node)) * math.prod(_shape(bind(node)["weight"])[1:])
    return 0


def has_effect(node: fx.Node) -> bool:
    """True where the node must stay though nothing reads it. A random call whose result is unread has no effect."""
    return node.is_impure(impure_random=False)


def is_pure(node: fx.Node) -> bool:
    """True where equal arguments give equal values and nothing else happens.

    Random operators are not pure (dropout is in evaluation), nor is batch norm in training mode.
    """
    if node.op != "call_function" or has_effect(node):
        return False
    if is_op(node, "dropout"):
        return bind(node)["train"] is False
    if is_op(node, "attention"):
        return bool(bind(node)["dropout_p"] == 0)
    if is_op(node, "batch_norm"):
        return bind(node)["training"] is False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags
