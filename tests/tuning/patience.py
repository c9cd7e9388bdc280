"""Clock budgets on a machine that may be busy: the same call goes on where it stopped, so it is made again until it has measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TIMES = 20


def until(measured: Callable[[T], bool], call: Callable[[], T]) -> T:
    """What ``call`` returns once ``measured`` says so. Raises AssertionError after twenty calls."""
    for _ in range(_TIMES):
        result = call()
        if measured(result):
            return result
    raise AssertionError(f"nothing was measured in {_TIMES} budgets")
