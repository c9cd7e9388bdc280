"""Top-1 and agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Model = Callable[[Array], Array]


def classes(model: Model, pictures: Iterable[Array]) -> list[int]:
    """The index of the largest output for each picture, run one at a time."""
    return [int(model(picture[None]).argmax()) for picture in pictures]


def equal(left: Sequence[int], right: Sequence[int]) -> int:
    """At how many positions two lists agree."""
    return sum(a == b for a, b in zip(left, right, strict=True))
