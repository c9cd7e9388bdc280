"""``graphopt export``: a ``.gopt`` for hosts without Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, print_table, size


def _prefix(model: Path) -> str:
    """A C identifier from the file's name."""
    text = re.sub(r"[^a-z0-9_]+", "_", model.stem.lower()).strip("_")
    return text if text[:1].isalpha() else f"model_{text}".rstrip("_")


def command(
    model: Annotated[Path, typer.Argument(help="A compiled model (.gopt), for any target.")],
    c: Annotated[
        Path | None,
        typer.Option(
            "--c",
            metavar="FOLDER",
            help="Write C: a header, the kernels' object file, weights, CMakeLists.txt, main.c.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="PREFIX",
            help="What functions and files are called: PREFIX_run, PREFIX.h. Default: the model's name.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace these files in a folder that is not empty.")
    ] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a compiled model as C that needs neither Python nor TVM: four functions, no allocation while it runs.

    \b
    graphopt export tiny.gopt --c tiny/
    cmake -S tiny -B tiny/build && cmake --build tiny/build
    tiny/build/run_tiny tiny/tiny.weights x.bin y.bin
    """
    if c is None:
        fail("name the folder to write: --c FOLDER", code=2)
    from graphopt.artifact import read_artifact
    from graphopt.export import export_c
    from graphopt.export.folder import check_folder

    check_folder(c, force)
    exported = export_c(read_artifact(model, any_cpu=True), c, name or _prefix(model), force)
    if json:
        print_json(
            {
                "folder": str(exported.folder),
                "name": exported.name,
                "files": exported.files,
                "memory": exported.memory,
                "memory_per_thread": exported.memory_per_thread,
            }
        )
        return
    rows = [(file, size(count)) for file, count in exported.files.items()]
    print_table(f"{exported.folder}", ("file", "size"), rows)
    print(
        f"memory: {size(exported.memory)} for one thread, {size(exported.memory_per_thread)} for each further one, "
        "and the weights"
    )
