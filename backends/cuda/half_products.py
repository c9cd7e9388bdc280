"""Products of float16 activations, for TVM: ``graphopt::half_matmul(a, b) -> float32``, and attention as two of them.

``matmul(float32(a), float32(b))`` would reach TVM as two copies in float32, each repeated for every matrix of a batch. An operator of
its own reads float16 and adds in float32 in one kernel. Attention is ``float16(softmax(q k^T * scale + mask)) v``: what PyTorch's
own attention, which the program calls, keeps of its probabilities in float32 is rounded to float16 here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cuda.autocast import half_behind
from graphopt.edit import Build, sweep
from graphopt.program import Program

aten = torch.ops.aten
Masks = dict[tuple[int, int], fx.Node]
_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("half_matmul(Tensor a, Tensor b) -> Tensor")  # type: ignore[no-untyped-call]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a.float(), b.float())


torch.library.register_fake("graphopt::half_matmul", _product, lib=_LIBRARY)


def spell_half_products(program: Program) -> Program:
    """The program as it is lowered: products of what was cast from float16 by ``half_matmul``, attention in parts."""
    found = [node.name for node in program.graph.nodes if _operands(node) is not None]
    if not found:
        return program
    program = program.clone()
    masks: Masks = {}
    for node in list(program.graph.nodes):
        operands = _operands(node) if node.name in found else None
        if operands is None:
            continue
        build = Build(program, node, [node])
        if ops.is_op(node, "attention"):
            made = _attention(build, node, operands, masks)
        else:
            made = build.call(torch.ops.graphopt.half_matmul.default, *operands)
        node.replace_all_uses_with(made)
    sweep(program)
    program.graph_module.recompile()
    return program


def _operands(node: fx.Node) -> list[fx.Node] | None:
    """The float16 matrices that a product multiplies; None for any other node."""
    if not ops.is_op(node, "matmul", "bmm", "mm", "attention"):
        return None
    a = ops.bind(node)
    if ops.is_op(node, "attention") and (a["dropout_p"] or a["enable_gqa"]):
        return None
    if a.get("is_causal") and _causal_size(node) is None:
        return None
    count = 3 if ops.is_op(node, "attention") else 2
    given = list(a.values())[:count]
    halves = [half_behind(value) for value in given]
    if any(
        half is None or value.meta["val"].dim() < 2
        for half, value in zip(halves, given, strict=True)
    ):
        return None
    return [half for half in halves if half is not None]


def _causal_size(attention: fx.Node) -> tuple[int, int] | None:
    """Queries and keys of a causal attention, where both are known."""
    a = ops.bind(attention)
    sizes = [a[name].meta["val"].shape[-2] for name in ("query", "key")]
    return (sizes[0], sizes[1]) if all(isinstance(size, int) for size in sizes) else None


def _causal_mask(build: Build, size: tuple[int, int], masks: Masks) -> fx.Node:
    """``-inf`` for the keys behind a query's own place, once for all attentions of a size."""
    if size not in masks:
        mask = torch.full(size, -math.inf).triu(1)
        masks[size] = build.parameter("causal_mask", mask, trainable=False)
    return masks[size]


def _attention(build: Build, node: fx.Node, operands: list[fx.Node], masks: Masks) -> fx.Node:
    a = ops.bind(node)
    query, key, value = operands
    product = torch.ops.graphopt.half_matmul.default
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(query.meta["val"].shape[-1])
    scores = build.call(product, query, build.transpose(key, -2, -1))
    scores = build.mul(scores, float(scale))
    mask: Any = a["attn_mask"]
    size = _causal_size(node) if a["is_causal"] else None
    if size is not None:  # every query sees the first key
        likely = build.softmax(build.add(scores, _causal_mask(build, size, masks)), -1)
    elif mask is None:
        likely = build.softmax(scores, -1)
    else:
        if mask.meta["val"].dtype == torch.bool:
            mask = build.call(aten.where.Scalar, mask, 0.0, -math.inf)
        # a row that may see nothing is 0, and not NaN
        likely = build.call(aten._safe_softmax.default, build.add(scores, mask), -1)
    return build.call(product, build.call(aten.to.dtype, likely, torch.float16), value)
