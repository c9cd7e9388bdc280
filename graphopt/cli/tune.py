"""``graphopt tune``: measure how a model's kernels are best cut, and keep what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, print_table, step
from graphopt.cli.source import Source


def command(
    model: options.Model,
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="How long to measure: 30s, 5m, 1h.")
    ] = "30s",
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="FILE",
            help="Where measurements are kept (SQLite); by default in the cache folder.",
        ),
    ] = None,
    rpc: options.Rpc = None,
    key: options.DeviceKey = None,
    target: options.TargetName = "native",
    threads: options.Threads = None,
    recipe: options.Recipe = None,
    passes: options.Passes = None,
    calibration: options.Calibration = None,
    data: options.Data = None,
    input_shape: options.Shapes = None,
    dynamic_batch: options.DynamicBatch = None,
    weights: options.Weights = None,
    image_mean: options.Mean = "0.485,0.456,0.406",
    image_std: options.Deviation = "0.229,0.224,0.225",
    trust: options.Trust = False,
    plugin: options.Plugins = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure other cuts of a model's convolutions and linear layers than the cost model's, the longest layers first.

    The same command goes on where the last one stopped; Ctrl-C loses at most the trial in progress. `graphopt compile
    --tuning FILE` compiles with the winners.

    \b
    graphopt tune tiny.pt2 --trust --budget 30s --store tuning.sqlite
    graphopt compile tiny.pt2 --trust --tuning tuning.sqlite -o tiny.gopt
    graphopt tune tiny.pt2 --trust --target avx2 --rpc 127.0.0.1:9190 --key laptop
    """
    from graphopt.tuning.options import Tuning, parse_budget

    tuning = Tuning(store, rpc, key)
    parse_budget(budget)
    program = Source(
        model,
        weights,
        input_shape or (),
        dynamic_batch,
        recipe,
        passes or (),
        calibration,
        image_mean,
        image_std,
        trust,
        data,
    ).program()
    import graphopt as go
    from graphopt.tuning.report import COLUMNS

    with step(f"measuring for {budget}"):
        report = go.tune(program, target, budget, threads, tuning)
    if json:
        print_json(report.to_json())
    else:
        print_table("", COLUMNS, report.rows())
        print(report.line())
    if report.interrupted:
        fail(f"interrupted; what was measured is in {tuning.path}", code=130)
