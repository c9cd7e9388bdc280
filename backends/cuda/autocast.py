"""Which operators compute on float16, which in float32, and which move elements: the lists of ``torch.autocast``.

Source: PyTorch's documentation of ``torch.amp``, "CUDA Ops that can autocast to float16" and "to float32" (the macros
``AT_FORALL_LOWER_PRECISION_FP`` and ``AT_FORALL_FP32`` of ``ATen/autocast_mode.h``), by the names that capture leaves. Means,
variances and sums of exponentials, which autocast runs in their input's type with float32 sums inside, are in float32 here.
"""

from __future__ import annotations

import enum
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops

LARGEST = 65504.0  # of float16; beyond 65519 rounding gives infinity


class Kind(enum.Enum):
    """What a node does with floats.

    ``PRODUCT``: multiplies float16 operands. ``NORM``: computes in float32 what may be stored in float16. ``FLOAT32``: its
    results need float32's range or precision. ``MOVE``: leaves elements as they are. ``FOLLOW``: stores what its inputs are.
    ``EXACT``: takes and makes float32 (integer operators, and those of other element types). ``SIZE``: reads shapes only.
    """

    PRODUCT = enum.auto()
    NORM = enum.auto()
    FLOAT32 = enum.auto()
    MOVE = enum.auto()
    FOLLOW = enum.auto()
    EXACT = enum.auto()
    SIZE = enum.auto()
    SOURCE = enum.auto()
    OUTPUT = enum.auto()


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_PRODUCTS = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul mm bmm mv addmm addmv ",
    "addbmm baddbmm einsum chain_matmul linalg_multi_dot scaled_dot_product_attention",
)
_NORMS = _names(
    "batch_norm layer_norm group_norm instance_norm rms_norm softmax _softmax log_softmax"
)
_FLOAT32 = _names(
    "pow exp exp2 expm1 log log10 log1p log2 reciprocal rsqrt acos asin cosh sinh tan erfinv cumsum cumprod prod sum mean var ",
    "std var_mean std_mean norm linalg_vector_norm linalg_norm logsumexp softplus cdist dist cosine_similarity renorm",
)
_MOVES = _names(
    "index_select gather index embedding narrow movedim roll repeat tile view_as unbind expand_as dropout",
)
_ADDED = frozenset(("bias", "attn_mask"))  # a product adds these in float32


def kind_of(node: fx.Node) -> Kind:
    """The kind of a node of a program whose floats are float32."""
    if node.op in ("placeholder", "get_attr"):
        return Kind.SOURCE
    if node.op == "output":
        return Kind.OUTPUT
    if node.target is operator.getitem:
        return Kind.MOVE
    if not any(isinstance(leaf, torch.Tensor) for leaf in values(node)):
        return Kind.SIZE
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name.startswith("graphopt::") or not _is_float32(node):
        return Kind.EXACT
    name = schema.name.split("::")[1]
    if name in _PRODUCTS:
        return Kind.PRODUCT
    if name in _NORMS:
        return Kind.NORM
    if name in _FLOAT32:
        return Kind.FLOAT32
    op = ops.info(node)
    if name in _MOVES or (op is not None and op.kind == "shape") or _pads_with_zeros(node):
        return Kind.MOVE
    return Kind.FLOAT32 if _leaves_range(node) else Kind.FOLLOW


def is_added(node: fx.Node, argument: str) -> bool:
    """True for what a product adds to its sum, by the argument's name in the schema."""
    name = node.target._schema.name  # type: ignore[union-attr]
    return argument in _ADDED or (argument == "self" and "add" in name)


def values(node: fx.Node) -> list[Any]:
    """The fake tensors of a node's result."""
    return pytree.tree_leaves(node.meta.get("val"))


def holds_float32(node: fx.Node) -> bool:
    """True where the result, or a part of it, is float32."""
    return any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values(node))


def is_cast(node: fx.Node | None) -> bool:
    """True for a change of element type."""
    return node is not None and node.target is torch.ops.aten.to.dtype


def half_behind(node: fx.Node) -> fx.Node | None:
    """The float16 value that a float32 one was cast from."""
    if not is_cast(node) or node.meta["val"].dtype != torch.float32:
        return None
    source = node.all_input_nodes[0]
    return source if source.meta["val"].dtype == torch.float16 else None


def _is_float32(node: fx.Node) -> bool:
    """True where every float that the node takes or makes is float32."""
    tensors = [v for n in (node, *node.all_input_nodes) for v in values(n)]
    floats = {v.dtype for v in tensors if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return floats == {torch.float32}


def _pads_with_zeros(node: fx.Node) -> bool:
    if not ops.is_op(node, "pad"):
        return False
    return ops.bind(node).get("value") in (None, 0)


def _leaves_range(node: fx.Node) -> bool:
    """True where a number of the call is finite and beyond float16, as the masks of some transformers are."""
    numbers = [v for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, float)]
    return any(LARGEST < abs(number) < math.inf for number in numbers)
