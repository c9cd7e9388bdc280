"""Progress bars on a terminal's stderr; silence where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """``items``, with a bar that disappears when done."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(
        items, description=label, total=total, console=Console(stderr=True), transient=True
    )
