"""What a person sees: tables on stdout, progress and errors on stderr; JSON for a program."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

LAYER_COLUMNS = ("pass", "layer", "how", "parameters", "after", "MACs", "after", "error")
_WIDTH_OF_A_PIPE = 160  # a file has no width: columns are not cut short there


def fail(message: str, code: int = 1) -> NoReturn:
    """Print ``Error: message`` on stderr and leave with ``code``."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@contextmanager
def step(label: str) -> Iterator[None]:
    """Say on stderr what begins, and how long it took."""
    typer.echo(f"{label} ...", err=True)
    started = time.perf_counter()
    yield
    typer.echo(f"{label}: {time.perf_counter() - started:.1f} s", err=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; columns of numbers are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row))
    print_rich(table)


def print_rich(value: Any) -> None:
    """Print something of rich's as wide as the terminal, or wide where stdout is a pipe."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_A_PIPE)
    console.print(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def layer_rows(records: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """A row for each layer that a pass of the history (as JSON) changed, under ``LAYER_COLUMNS``."""
    return [
        (
            record["pass"],
            layer["layer"] or layer["node"],
            layer["text"],
            *layer["parameters"],
            *layer["macs"],
            layer["error"],
        )
        for record in records
        for layer in record.get("layers", ())
    ]


def size(count: int) -> str:
    """``4.3 MB``: decimal units."""
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
