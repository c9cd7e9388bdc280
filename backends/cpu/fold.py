"""Reductions of a run of elements to a scalar, and element-wise maps of rows."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import (
    Accumulators,
    Expr,
    bind,
    broadcast,
    constant,
    select,
    slice_lanes,
)

Combine = Callable[[Expr, Expr], Expr]

_CHAINS = 4  # sums of their own: one waits 4 cycles for itself


def plus(a: Expr, b: Expr) -> Expr:
    """``a + b``."""
    return a + b


def largest(a: Expr, b: Expr) -> Expr:
    """The larger of two."""
    return T.max(a, b)


def narrowed(lanes: int, *extents: int) -> int:
    """The widest vector that fits into every one of the runs."""
    least = min(extents)
    return min(lanes, 1 << (least.bit_length() - 1))


def lane_numbers(start: Expr, lanes: int) -> Expr:
    """``start + 0, start + 1, ...`` as int32."""
    first = tirx.const(start, "int32") if isinstance(start, int) else T.cast(start, "int32")
    return first if lanes == 1 else tirx.Ramp(first, tirx.const(1, "int32"), lanes)


def horizontal(value: Expr, lanes: int, combine: Combine) -> Expr:
    """The fold of a vector's lanes, halving it each time."""
    while lanes > 1:
        value = bind(value)
        lanes //= 2
        halves = [slice_lanes(value, first, lanes, 2 * lanes) for first in (0, lanes)]
        value = combine(*halves)
    return bind(value)


def fold(
    extent: int, lanes: int, start: float, combine: Combine, value: Callable[[Expr, int], Expr]
) -> Expr:
    """``value`` over ``[0, extent)`` folded to a scalar; ``start`` is neutral.

    ``value(offset, lanes)`` may store on its way: where vectors do not cover the run, the last one overlaps its
    neighbour, and the lanes that it shares do not count twice.
    """
    lanes = narrowed(lanes, extent)
    steps, rest = divmod(extent, lanes)
    chains = min(_CHAINS, steps)
    sums = Accumulators(1, chains, "float32", lanes)
    neutral = constant("float32", start, lanes)
    for chain in range(chains):
        sums.set(0, chain, neutral)

    def take(chain: int, offset: Expr) -> None:
        sums.set(0, chain, combine(sums.get(0, chain), bind(value(offset, lanes))))

    rounds = steps // chains
    with T.serial(0, rounds) as index:
        for chain in range(chains):
            take(chain, index * (chains * lanes) + chain * lanes)
    for step in range(rounds * chains, steps):
        take(step % chains, step * lanes)
    total = sums.get(0, 0)
    for chain in range(1, chains):
        total = combine(total, sums.get(0, chain))
    if rest:
        last = bind(value(extent - lanes, lanes))
        fresh = lane_numbers(0, lanes) >= broadcast(tirx.const(lanes - rest, "int32"), lanes)
        total = combine(total, select(fresh, last, neutral))
    return horizontal(total, lanes, combine)
