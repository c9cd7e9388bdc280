"""``graphopt targets``: what a model can be compiled for."""

from __future__ import annotations

from graphopt.cli import options
from graphopt.cli.console import print_json, print_table


def command(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the targets, and whether this CPU can run code compiled for each.

    \b
    graphopt targets
    graphopt targets --json
    """
    from graphopt.backends.targets import ALIASES, TARGETS

    native = next((row.name for row in TARGETS.values() if row.runs_here()), None)
    rows = [
        {
            "name": row.name,
            "kind": row.kind,
            "architecture": row.architecture,
            "description": row.description,
            "runs_here": row.runs_here(),
            "native": row.name == native,
            "missing": list(row.missing()),
            "aliases": sorted(alias for alias, name in ALIASES.items() if name == row.name),
        }
        for row in TARGETS.values()
    ]
    if json:
        print_json(rows)
        return
    print_table(
        "",
        ("target", "architecture", "runs here", "what it uses", "also called"),
        [
            (
                row["name"],
                row["architecture"],
                _verdict(row["runs_here"], row["native"], row["missing"]),
                row["description"],
                ", ".join(row["aliases"]),
            )
            for row in rows
        ],
    )


def _verdict(runs: object, native: object, missing: object) -> str:
    if native:
        return "yes (native)"
    if runs:
        return "yes"
    return f"no: {', '.join(missing)}" if isinstance(missing, list) and missing else "no"
