"""What products of two values do to channels: matmul, einsum and attention, by the letters of Einstein's notation."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from torch import fx

from graphopt.passes.prune.channels.labels import UNKNOWN, Axis, Dimension, Dimensions, Fixed
from graphopt.passes.prune.channels.walk import Walk, rule, shape_of

Answer = Dimensions | list[Dimensions]


@rule("matmul", "bmm", "mm")
def matmul(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``[..., n, k] x [..., k, m]`` with leading axes broadcast."""
    first, second = list(a.values())[:2]
    ranks = (len(walk.dims(first)), len(walk.dims(second)))
    if min(ranks) < 2:
        return walk.give_up(node)
    batch = string.ascii_uppercase[: max(ranks) - 2]
    left = batch[len(batch) - ranks[0] + 2 :] + "nk"
    right = batch[len(batch) - ranks[1] + 2 :] + "km"
    return product(walk, node, (first, second), (left, right), batch + "nm")


@rule("addmm")
def addmm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``bias + x W``: the bias is one number a column."""
    bias = walk.dims(a["self"])
    plain = a["alpha"] == 1 and a["beta"] == 1 and len(bias) == 1 and walk.is_constant(a["self"])
    if not plain:
        return walk.give_up(node)
    rows, columns = product(walk, node, (a["mat1"], a["mat2"]), ("nk", "km"), "nm")
    walk.role(bias[0], "bias", node)
    columns = walk.tie(columns, bias[0], node)
    if isinstance(rows, Axis):
        rows = rows.like(rest=np.full(rows.size, UNKNOWN))
    if node in walk.layers:
        walk.layers[node] = columns
    return [rows, columns]


@rule("einsum.default")
def einsum(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """Two operands, each letter at most once in each, an explicit result."""
    equation, operands = a["equation"].replace(" ", ""), a["tensors"]
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    simple = arrow and len(letters) == 2 == len(operands) and "." not in equation
    if not simple or any(len(set(term)) != len(term) for term in (*letters, result)):
        return walk.give_up(node)
    summed_alone = (set(letters[0]) ^ set(letters[1])) - set(result)
    if summed_alone:
        return walk.give_up(node)
    return product(walk, node, (operands[0], operands[1]), (letters[0], letters[1]), result)


def product(
    walk: Walk,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    letters: tuple[str, str],
    result: str,
) -> Dimensions:
    """A letter in both operands couples their axes; one that is summed over must hold zeros in one of them."""
    axes = [
        dict(zip(term, walk.dims(v), strict=True))
        for term, v in zip(letters, operands, strict=True)
    ]
    sizes = [
        dict(zip(term, shape_of(v), strict=True)) for term, v in zip(letters, operands, strict=True)
    ]
    constant = [walk.is_constant(v) for v in operands]
    out: dict[str, Dimension] = {}
    for letter in dict.fromkeys(letters[0] + letters[1]):
        both = letter in axes[0] and letter in axes[1]
        if both and sizes[0][letter] == sizes[1][letter]:
            pair = (axes[0][letter], axes[1][letter])
            tied = walk.tie(*pair, node)
            if letter not in result:
                _sum(walk, node, tied, pair, constant)
            out[letter] = _multiplied(tied, pair)
        else:  # in one operand alone, or broadcast
            one = 0 if sizes[0].get(letter, 1) > 1 or letter not in axes[1] else 1
            dimension = axes[one][letter]
            if constant[one] and not constant[1 - one]:
                walk.role(dimension, "output", node)
                walk.layers[node] = dimension
            if letter not in result:
                dimension = walk.freeze(dimension, f"{node.name} sums over it alone")
            out[letter] = _multiplied(dimension, (dimension,))
    return [out[letter] for letter in result]


def _sum(
    walk: Walk,
    node: fx.Node,
    tied: Dimension,
    pair: tuple[Dimension, Dimension],
    constant: list[bool],
) -> None:
    if not isinstance(tied, Axis):
        return
    for dimension, is_constant in zip(pair, constant, strict=True):
        if is_constant:
            walk.role(dimension, "input", node)
    if not any(constant):
        walk.contracted.append(tied.ids)
    read = [d for d, c in zip(pair, constant, strict=True) if isinstance(d, Axis) and not c]
    if not read:
        walk.freeze(tied, f"{node.name} multiplies two parameters")
    elif not any(axis.is_zero for axis in read):
        walk.absorb(read[0], node)
    walk.sources.setdefault(node, []).append(tied.ids)


def _multiplied(tied: Dimension, pair: tuple[Dimension, ...]) -> Dimension:
    """Zero where either factor is."""
    if not isinstance(tied, Axis):
        return tied
    zero = np.any([d.rest == 0 for d in pair if isinstance(d, Axis)], axis=0)
    return tied.like(rest=None if zero.all() else np.where(zero, 0.0, UNKNOWN))


@rule("attention")
def attention(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Answer:
    """``softmax(q k^T * scale + mask) v``: heads couple; so do the features of q and k, which are summed over."""
    query, key, value = (walk.dims(a[name]) for name in ("query", "key", "value"))
    ranks = {len(query), len(key), len(value)}
    if len(ranks) > 1 or a.get("enable_gqa") or len(query) < 3:
        return walk.give_up(node)
    for dimension in (query[-2], key[-2], value[-2]):
        walk.freeze(dimension, f"{node.name} attends over it")
    shapes = [shape_of(a[name])[:-2] for name in ("query", "key", "value")]
    lead: Dimensions = []
    for axis, dimension in enumerate(query[:-2]):
        if len({shape[axis] for shape in shapes}) > 1:
            return walk.give_up(node)
        tied = walk.tie(walk.tie(dimension, key[axis], node), value[axis], node)
        lead.append(_multiplied(tied, (value[axis],)))  # zero queries read the mean of v, not zero
    if a["attn_mask"] is not None:
        lead = _with_mask(walk, node, a["attn_mask"], lead)
    features = walk.tie(query[-1], key[-1], node)
    if isinstance(features, Axis):
        _sum(walk, node, features, (query[-1], key[-1]), [False, False])
    out = value[-1]
    if isinstance(out, Axis) and not out.is_zero:
        out = out.like(rest=np.where(out.rest == 0, 0.0, UNKNOWN))
    return [*lead, Fixed(), out]


def _with_mask(walk: Walk, node: fx.Node, mask: fx.Node, lead: Dimensions) -> Dimensions:
    dims, shape = walk.dims(mask), shape_of(mask)
    for dimension in dims[-2:]:
        walk.freeze(dimension, f"{node.name} attends over it")
    offset = len(dims) - 2 - len(lead)
    for axis in range(len(lead)):
        if axis + offset >= 0 and shape[axis + offset] > 1:
            tied = walk.tie(lead[axis], dims[axis + offset], node)
            lead[axis] = lead[axis] if isinstance(tied, Axis) else tied
    return lead
