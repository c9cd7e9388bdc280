"""``graphopt demo``: the whole way on a real network, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import options
from graphopt.cli.console import print_json, print_table, step


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write into.")
    ] = Path("demo-out"),
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Take EfficientNet-Lite0 from PyTorch to a measured int8 file (under 3 minutes on 2 cores).

    \b
    graphopt demo
    graphopt demo --output demo-out --json
    """
    from graphopt.artifact import check_writable
    from graphopt.demo import run as demo

    output.mkdir(parents=True, exist_ok=True)
    for name in (demo.MODEL, demo.NUMBERS, demo.PAGE):
        check_writable(output / name)
    result = demo.run(output, step)
    if json:
        print_json(result.to_json())
        return
    print_table("", ("what", "measured"), result.rows())
    print_table(
        "the five slowest int8 kernels",
        ("layer", "operator", "ms", "share", "GOPS", "of peak"),
        [
            (
                slow.layer,
                slow.operator,
                slow.milliseconds,
                f"{slow.share:.1%}",
                slow.gops,
                "-" if slow.share_of_peak is None else f"{slow.share_of_peak:.0%}",
            )
            for slow in result.slowest
        ],
    )
    print(f"{output / demo.PAGE} shows it; took {result.seconds:.0f} s")
