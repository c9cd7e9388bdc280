"""From classes of labels to groups: channels that appear in the same axes equally often make one group.

A balance (equally many channels of each block) joins the groups that it touches and divides them into blocks. Where
that cannot be kept by choosing among them (a block with fewer free channels than another), they are frozen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from graphopt.passes.prune.channels.labels import Balance, Classes, Ids


@dataclass(frozen=True)
class Partition:
    """``group[class]`` (-1 where frozen), and within it ``block`` and ``part``."""

    group: Ids
    block: Ids
    part: Ids


def partition(classes: Classes, axes: Iterable[Ids], balances: list[Balance]) -> Partition:
    """Groups of the free classes; freezes those whose balance cannot be kept."""
    part = _signatures(classes, axes)
    while True:
        blocks = _settled(classes, balances)
        group = _joined(classes, part, blocks)
        block = _cells(classes, group, blocks, balances)
        if block is not None:
            return Partition(group, block, _within(group, part))


def _signatures(classes: Classes, axes: Iterable[Ids]) -> Ids:
    """A number for each class; two are equal where the classes appear in the same axes equally often."""
    generator = np.random.default_rng(0)
    codes = np.zeros(classes.number, np.uint64)
    for ids in axes:
        code = generator.integers(1, 2**63, dtype=np.uint64)
        np.add.at(codes, classes.of[ids.ravel()], code)
    _, signature = np.unique(codes, return_inverse=True)
    return signature.astype(np.int64)


def _settled(classes: Classes, balances: list[Balance]) -> list[Ids]:
    """For each balance the block of each class: -1 where it is not in it, or equally often in all of its blocks."""
    while True:
        before = int((classes.cause >= 0).sum())
        blocks = [_blocks(classes, balance) for balance in balances]
        if int((classes.cause >= 0).sum()) == before:
            return blocks


def _blocks(classes: Classes, balance: Balance) -> Ids:
    held = classes.of[balance.ids].reshape(balance.blocks, -1)
    number = np.repeat(np.arange(balance.blocks), held.shape[1])
    block = np.full(classes.number, -1, np.int64)
    members, index = np.unique(held, return_inverse=True)
    table = np.zeros((len(members), balance.blocks), np.int64)
    np.add.at(table, (index.ravel(), number), 1)
    even = (table == table[:, :1]).all(axis=1)
    local = (table > 0).sum(axis=1) == 1
    weight = table.max(axis=1)
    free = classes.is_free(members)
    uneven = ~even & ~local
    classes.freeze(
        members[uneven], f"{balance.reader} reads it unequally often in each of its groups"
    )
    chosen = local & free & ~even
    sums = np.zeros(balance.blocks, np.int64)
    home = table.argmax(axis=1)
    np.add.at(sums, home[chosen], 1)
    if chosen.any() and (len(set(sums.tolist())) > 1 or len(set(weight[chosen].tolist())) > 1):
        classes.freeze(members[chosen], f"the groups of {balance.reader} would lose unequally many")
        return block
    block[members[chosen]] = home[chosen]
    return block


def _joined(classes: Classes, part: Ids, blocks: list[Ids]) -> Ids:
    """Parts joined by balances, numbered by their first class."""
    graph: nx.Graph[int] = nx.Graph()
    free = np.flatnonzero(classes.cause < 0)
    graph.add_nodes_from(np.unique(part[free]).tolist())
    for block in blocks:
        nx.add_path(graph, np.unique(part[block >= 0]).tolist())
    group_of = np.full(int(part.max(initial=0)) + 1, -1, np.int64)
    first = dict(zip(part[free[::-1]].tolist(), free[::-1].tolist(), strict=True))
    components = sorted(nx.connected_components(graph), key=lambda c: min(first[p] for p in c))
    for number, joined in enumerate(components):
        group_of[list(joined)] = number
    return np.where(classes.cause < 0, group_of[part], -1) if classes.number else part


def _cells(
    classes: Classes, group: Ids, blocks: list[Ids], balances: list[Balance]
) -> NDArray[np.int64] | None:
    """The block of each class within its group; None where classes had to be frozen.

    Where several balances touch a group, its blocks are those of all of them at once; choosing equally many of each
    then keeps every balance, if each of its own blocks is made of equally many.
    """
    touching: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(blocks):
        for owner in np.unique(group[block >= 0]).tolist():
            touching[owner].append(number)
    touching.pop(-1, None)
    cells = np.zeros(classes.number, np.int64)
    before = int((classes.cause >= 0).sum())
    for owner, numbers in touching.items():
        members = np.flatnonzero(group == owner)
        keys = np.stack([blocks[number][members] for number in numbers], axis=1)
        rows, cell, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        if not _is_even(sizes) or not all(_is_even(_counts(column)) for column in rows.T):
            readers = sorted({balances[number].reader for number in numbers})
            said = readers[0] if len(readers) == 1 else f"{readers[0]} and {len(readers) - 1} other"
            classes.freeze(members, f"the groups of {said} cannot all lose equally many")
        cells[members] = cell.ravel()
    return cells if int((classes.cause >= 0).sum()) == before else None


def _is_even(sizes: Ids) -> bool:
    return bool((sizes == sizes[:1]).all())


def _counts(column: Ids) -> Ids:
    return np.unique(column[column >= 0], return_counts=True)[1]


def _within(group: Ids, part: Ids) -> Ids:
    """Parts numbered from 0 within each group."""
    out = np.zeros_like(part)
    free = np.flatnonzero(group >= 0)
    pairs = group[free] * (int(part.max(initial=0)) + 1) + part[free]
    _, first, index = np.unique(pairs, return_index=True, return_inverse=True)
    owner = group[free][first]
    out[free] = (np.arange(len(first)) - np.searchsorted(owner, owner))[index]
    return out
