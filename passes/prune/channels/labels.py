"""What is known of an axis: which of its indices must be kept or removed together, and what a removed index would hold.

Every index of a parameter's axis that may be removed has a label, a number. Operators tie labels (an add ties both
operands' channels, one by one), freeze them (a network's outputs), or balance them (a grouped convolution reads equally
many of each group). ``Labels.solve`` turns ties into classes: two indices are removed together exactly where they are of
one class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
Rest = NDArray[np.float64]
Slot = tuple[str, int]  # a parameter's name and one of its axes
UNKNOWN = float("nan")


@dataclass(frozen=True)
class Fixed:
    """An axis whose size never changes; ``reason`` says why, where it is not simply no axis of channels."""

    reason: str | None = None


class Axis:
    """An axis with labels: ``ids[i]`` is the label of index i, ``rest[i]`` what the masked network holds there.

    ``rest`` is NaN where that is unknown, or not one number over the other axes. ``slots`` are the parameters' axes of
    which a constant expression is made. A parameter's labels are made when they are first asked for.
    """

    __slots__ = ("_ids", "_labels", "_rest", "size", "slots")

    def __init__(
        self,
        labels: Labels,
        size: int,
        ids: Ids | None = None,
        rest: Rest | None = None,
        slots: frozenset[Slot] = frozenset(),
    ) -> None:
        self._labels = labels
        self.size = size
        self._ids = ids
        self._rest = rest
        self.slots = slots

    @property
    def ids(self) -> Ids:
        if self._ids is None:
            self._ids = self._labels.fresh(self.size)
        return self._ids

    @property
    def rest(self) -> Rest:
        return np.zeros(self.size) if self._rest is None else self._rest

    @property
    def is_zero(self) -> bool:
        """True where every removed channel holds zeros."""
        return self._rest is None or not self._rest.any()

    @property
    def is_named(self) -> bool:
        """False for a parameter's axis that nothing has asked for yet."""
        return self._ids is not None

    def adopt(self, ids: Ids) -> None:
        """Take another axis' labels for one's own, which saves a tie for each."""
        assert self._ids is None
        self._ids = ids

    def like(self, ids: Ids | None = None, rest: Rest | None = None) -> Axis:
        """The same axis with other labels or another rest (zero where None)."""
        ids = self.ids if ids is None else ids
        return Axis(self._labels, len(ids), ids, rest, self.slots)


Dimension = Axis | Fixed
Dimensions = list[Dimension]


@dataclass(frozen=True)
class Balance:
    """Equally many of each of ``blocks`` runs of ``ids`` must be kept, as ``reader`` asks."""

    ids: Ids
    blocks: int
    reader: str


@dataclass
class Labels:
    """The labels of one program and what was said of them."""

    count: int = 0
    balances: list[Balance] = field(default_factory=list)
    _pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    _frozen: list[tuple[Ids, str]] = field(default_factory=list)

    def fresh(self, size: int) -> Ids:
        """``size`` new labels."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def tie(self, left: Ids, right: Ids) -> None:
        """``left[i]`` and ``right[i]`` are removed together."""
        assert left.shape == right.shape
        if left is not right:
            self._pairs.append((left.ravel(), right.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        """None of ``ids`` may be removed."""
        self._frozen.append((ids.ravel(), reason))

    def balance(self, ids: Ids, blocks: int, reader: str) -> None:
        """Equally many of each of ``blocks`` runs of ``ids`` must be kept."""
        self.balances.append(Balance(ids, blocks, reader))

    def solve(self) -> Classes:
        """The classes of the ties, and the first reason for which a class is frozen."""
        left = np.concatenate([pair[0] for pair in self._pairs] or [np.zeros(0, np.int64)])
        right = np.concatenate([pair[1] for pair in self._pairs] or [np.zeros(0, np.int64)])
        ties = coo_array((np.ones(len(left), np.int8), (left, right)), (self.count, self.count))
        number, of = connected_components(ties, directed=False)
        classes = Classes(of.astype(np.int64), np.full(number, -1, np.int64), [])
        for ids, reason in self._frozen:
            classes.freeze(of[ids], reason)
        return classes


@dataclass
class Classes:
    """``of[label]`` is a label's class; ``cause[class]`` an index into ``reasons``, -1 where the class is free."""

    of: Ids
    cause: Ids
    reasons: list[str]

    @property
    def number(self) -> int:
        return len(self.cause)

    def freeze(self, classes: Ids, reason: str) -> None:
        """Freeze classes that are still free."""
        still = classes[self.cause[classes] < 0]
        if still.size:
            self.cause[still] = len(self.reasons)
            self.reasons.append(reason)

    def is_free(self, classes: Ids) -> NDArray[np.bool_]:
        free: NDArray[np.bool_] = self.cause[classes] < 0
        return free
