"""Tables of the documents, written by the commands that measure them.

A document keeps each table between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what stands outside is a person's.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from graphopt.cpu_features import cpu_features
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write

_TELLING = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns also stand under each other as plain text; figures to the right."""
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rules = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(titles), line(rules), *(line(row) for row in rows)]


def command_line(script: str) -> str:
    """The command that is running, in code, without where it writes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--document", "--output"):
        parser.add_argument(option)
    for flag in ("--fresh", "--compile"):
        parser.add_argument(flag, action="store_true")
    _, kept = parser.parse_known_args(sys.argv[1:])
    return f"`{shlex.join(['python', script, *kept])}`"


def machine_line(name: str) -> str:
    """A CPU's name with those of its features that decide speed here, and the system."""
    features = [feature for feature in _TELLING if feature in cpu_features()]
    return f"{name} ({', '.join(features)}), {platform.system()} {platform.machine()}"


def replace_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between the marks of section ``name``; raises BenchmarkError where the file has no such marks."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise BenchmarkError(
            f"{path} has no section {name!r}; add the lines {begin!r} and {end!r} where the table belongs"
        )
    with atomic_write(path) as file:
        file.write("\n".join((head + begin, *lines, end + tail)).encode())
