"""How channels go through a view that merges and splits axes.

Both shapes are written as products of the same factors: ``[n, 3 * h * d] -> [n, 3, h, d]`` has the factors n, 3, h, d.
An axis that is split keeps its channels on one of its factors, and indices that agree in it go together: by default the
innermost, as a channel shuffle wants; the walk may be told to take another, as attention's heads want.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphopt.passes.prune.channels.labels import Axis, Dimension, Dimensions, Fixed
from graphopt.passes.prune.channels.walk import Walk, same_rest


def regroup(
    walk: Walk, node: fx.Node, source: Dimensions, old: list[int], new: list[int]
) -> Dimensions:
    """The axes of ``node``, a view of sizes ``new`` of a value with axes ``source`` and sizes ``old``."""
    if 0 in old:
        return _frozen(walk, node, source, len(new))
    cuts_old, cuts_new = _cuts(old), _cuts(new)
    cuts = sorted({*cuts_old, *cuts_new, prod(old)})
    carried: dict[int, Axis] = {}  # the factor that starts at this cut -> its channels
    clashing = {high for low, high in pairwise(cuts) if high % low}
    for axis, (dimension, low, size) in enumerate(zip(source, cuts_old, old, strict=True)):
        if not isinstance(dimension, Axis):
            continue
        run = [cut for cut in cuts if low <= cut <= low * size]
        if clashing.intersection(run[1:]):
            walk.freeze(dimension, f"{node.name} splits it unevenly")
            continue
        factors = [high // low for low, high in pairwise(run)]
        at = _choose(walk, node, axis, dimension, factors)
        carried[run[at]] = _carrier(walk, dimension, factors, at)
    reasons = _reasons(source, cuts_old, old)
    return [
        _out(walk, node, [c for c in cuts if low <= c <= low * size], carried, reasons, clashing)
        for low, size in zip(cuts_new, new, strict=True)
    ]


def _frozen(walk: Walk, node: fx.Node, source: Dimensions, rank: int) -> Dimensions:
    for dimension in source:
        walk.freeze(dimension, f"{node.name} is empty")
    return [Fixed()] * rank


def _cuts(shape: list[int]) -> list[int]:
    """The stride of each axis, in elements: axis i is the factors from cut i up to cut i times its size."""
    return list(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else []


def _reasons(source: Dimensions, cuts: list[int], shape: list[int]) -> dict[int, str]:
    return {
        cut: dimension.reason
        for dimension, cut, size in zip(source, cuts, shape, strict=True)
        if isinstance(dimension, Fixed) and dimension.reason and size > 1
    }


def _choose(walk: Walk, node: fx.Node, axis: int, dimension: Axis, factors: list[int]) -> int:
    """Which factor (0 is the innermost) carries: one along which alone the labels differ, else as the walk is told."""
    if len(factors) == 1:
        return 0
    grid = dimension.ids.reshape(factors[::-1])
    for at in range(len(factors)):
        rows = np.moveaxis(grid, len(factors) - 1 - at, 0).reshape(factors[at], -1)
        if (rows == rows[:, :1]).all():
            return at
    at = min(walk.choices.get(node, 0), len(factors) - 1)
    walk.splits[node] = (len(factors), dimension.ids)
    return at


def _carrier(walk: Walk, dimension: Axis, factors: list[int], at: int) -> Axis:
    if len(factors) == 1:
        return dimension
    place = len(factors) - 1 - at

    def rows(values: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(values.reshape(factors[::-1]), place, 0).reshape(factors[at], -1)

    ids, rest = rows(dimension.ids), rows(dimension.rest)
    first = np.ascontiguousarray(ids[:, 0])
    walk.labels.tie(np.repeat(first, ids.shape[1] - 1), ids[:, 1:].ravel())
    return dimension.like(first, same_rest(rest.T))


def _out(
    walk: Walk,
    node: fx.Node,
    run: list[int],
    carried: dict[int, Axis],
    reasons: dict[int, str],
    clashing: set[int],
) -> Dimension:
    """An axis of the view: its one carrying factor, repeated over the others."""
    inside = [carried[cut] for cut in run[:-1] if cut in carried]
    if not inside:
        return Fixed(next((reasons[cut] for cut in run[:-1] if cut in reasons), None))
    unfit = ""
    if clashing.intersection(run[1:]):
        unfit = f"{node.name} splits it unevenly"
    elif len(inside) > 1:
        unfit = f"{node.name} joins it with other channels"
    if unfit:
        for axis in inside:
            walk.freeze(axis, unfit)
        return Fixed(unfit)
    factors = [high // low for low, high in pairwise(run)][::-1]
    place = next(k for k, cut in enumerate(run[:-1][::-1]) if cut in carried)
    if len(factors) == 1:
        return inside[0]

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        shaped = values.reshape([-1 if k == place else 1 for k in range(len(factors))])
        return np.broadcast_to(shaped, factors).ravel()

    return inside[0].like(spread(inside[0].ids), spread(inside[0].rest))
