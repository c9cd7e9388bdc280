"""``graphopt targets``: what a model can be compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.cli import options
from graphopt.cli.console import print_json, print_table
from graphopt.cpu_features import architecture

if TYPE_CHECKING:
    from graphopt.backends.targets import Target


def command(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the targets: whether this CPU runs their code, the kernels there are, and how the tests run them.

    A second table has the CPU features that each target needs.

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
        ("target", "architecture", "runs here", "what it uses", "kernels", "tests", "also called"),
        [
            (
                row.name,
                row.architecture,
                _verdict(row, native),
                row.description,
                _families(row),
                row.verified,
                ", ".join(sorted(alias for alias, name in ALIASES.items() if name == row.name)),
            )
            for row in TARGETS.values()
        ],
    )
    print_table(
        "",
        ("target", "CPU features that it needs"),
        [(row.name, " ".join(sorted(row.features))) for row in TARGETS.values() if row.features],
    )


def _families(row: Target) -> str:
    """The families of kernels, by what is missing where that is little."""
    from graphopt.backends.targets import KERNELS

    absent = [family for family in KERNELS if family not in row.kernels]
    if len(absent) > 1:
        return ", ".join(row.kernels)
    return "all" if not absent else f"all but {absent[0]}"


def _described(row: Target) -> dict[str, Any]:
    from graphopt.backends.targets import ALIASES

    return {
        "name": row.name,
        "kind": row.kind,
        "architecture": row.architecture,
        "description": row.description,
        "runs_here": row.runs_here(),
        "features": sorted(row.features),
        "missing": list(row.missing()),
        "kernels": list(row.kernels),
        "verified": row.verified,
        "aliases": sorted(alias for alias, name in ALIASES.items() if name == row.name),
    }


def _verdict(row: Target, native: str | None) -> str:
    if row.name == native:
        return "yes (native)"
    if row.runs_here():
        return "yes"
    if row.kind == "cuda":
        return "where there is such a GPU"
    if row.architecture != architecture():
        return f"no: this CPU is {architecture()}"
    return f"no: this CPU lacks {', '.join(row.missing())}"
