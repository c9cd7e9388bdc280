"""``graphopt compress``: a model through passes to a ``.pt2``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, size, step
from graphopt.cli.source import Source, print_history


def command(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the program (.pt2).")
    ] = None,
    recipe: options.Recipe = None,
    passes: options.Passes = None,
    calibration: options.Calibration = None,
    data: options.Data = None,
    input_shape: options.Shapes = None,
    dynamic_batch: options.DynamicBatch = None,
    weights: options.Weights = None,
    image_mean: options.Mean = "0.485,0.456,0.406",
    image_std: options.Deviation = "0.229,0.224,0.225",
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where each pass declined, and why.")
    ] = False,
    trust: options.Trust = False,
    plugin: options.Plugins = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Apply passes to a model and save the result as a PyTorch program (.pt2).

    Without --output it only reports.

    \b
    graphopt compress nets:tiny --input-shape 1x3x32x32 --pass fold-batch-norm -o tiny.pt2
    graphopt compress nets:tiny --input-shape 1x3x32x32 --recipe int8.yaml --calibration photos/ -o q.pt2
    graphopt compress nets:tiny --input-shape 8x3x32x32 --pass prune:score=taylor --data labelled.npz -o p.pt2
    graphopt compress q.pt2 --trust --pass fold-batch-norm --explain
    """
    if output is not None:
        if output.suffix != ".pt2":
            fail(f"--output {output} must end in .pt2", code=2)
        from graphopt.artifact import check_writable

        check_writable(output)
    source = Source(
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
    )
    program = source.program()
    if output is not None:
        from graphopt.models import save_program

        with step(f"writing {output}"):
            save_program(program, output)
    stats = program.stats()
    if json:
        history = [record.to_json() for record in program.history]
        report = {"history": history, "stats": stats.to_json()}
        print_json({**report, "output": str(output) if output else None})
        return
    print_history(program.history, explain)
    print(f"{stats.parameters:,} parameters, {stats.macs:,} MACs, {size(stats.bytes)} of tensors")
