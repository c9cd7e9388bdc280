"""``graphopt targets``: what a model can be compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.cli import options
from graphopt.cli.console import print_json, print_table

if TYPE_CHECKING:
    from graphopt.backends.targets import Target


def command(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the targets, and whether this CPU can run code compiled for each.

    \b
    graphopt targets
    graphopt targets --json
    """
    from graphopt.backends.targets import ALIASES, TARGETS

    native = next((row.name for row in TARGETS.values() if row.runs_here()), None)
    if json:
        print_json([{**_described(row), "native": row.name == native} for row in TARGETS.values()])
        return
    print_table(
        "",
        ("target", "architecture", "runs here", "what it uses", "also called"),
        [
            (
                row.name,
                row.architecture,
                _verdict(row, native),
                row.description,
                ", ".join(sorted(alias for alias, name in ALIASES.items() if name == row.name)),
            )
            for row in TARGETS.values()
        ],
    )


def _described(row: Target) -> dict[str, Any]:
    from graphopt.backends.targets import ALIASES

    return {
        "name": row.name,
        "kind": row.kind,
        "architecture": row.architecture,
        "description": row.description,
        "runs_here": row.runs_here(),
        "missing": list(row.missing()),
        "aliases": sorted(alias for alias, name in ALIASES.items() if name == row.name),
    }


def _verdict(row: Target, native: str | None) -> str:
    if row.name == native:
        return "yes (native)"
    if row.runs_here():
        return "yes"
    if row.kind == "cuda":
        return "where there is such a GPU"
    return f"no: this CPU lacks {', '.join(row.missing())}"
