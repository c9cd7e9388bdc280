"""``graphopt compile``: a model, with or without passes, to a ``.gopt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, size, step
from graphopt.cli.source import Source


def command(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the compiled model (.gopt).")
    ],
    target: options.TargetName = "native",
    threads: options.Threads = None,
    precision: options.Precision = "float32",
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune", metavar="TIME", help="Measure choices first, for 30s or 5m, and use them."
        ),
    ] = None,
    tuning: Annotated[
        Path | None,
        typer.Option(
            "--tuning",
            metavar="FILE",
            help="Use the measurements of `graphopt tune --store FILE`; with --tune, add to them.",
        ),
    ] = None,
    rpc: options.Rpc = None,
    key: options.DeviceKey = None,
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
    """Compile a model for a target into one .gopt file that runs without PyTorch.

    \b
    graphopt compile tiny.pt2 --trust -o tiny.gopt
    graphopt compile nets:tiny --input-shape 1x3x32x32 --target avx2 --threads 2 -o tiny.gopt
    graphopt compile tiny.pt2 --trust --tune 30s -o tiny.gopt
    graphopt compile tiny.pt2 --trust --target a100 --precision float16 -o tiny.gopt
    graphopt compile nets:tiny --input-shape 1x3x32x32 --pass quantize --calibration data.npz -o q.gopt
    """
    if output.suffix != ".gopt":
        fail(f"--output {output} must end in .gopt", code=2)
    from graphopt.artifact import check_writable
    from graphopt.backends.targets import resolve
    from graphopt.precision import check_precision
    from graphopt.tuning.options import Tuning, parse_budget

    check_writable(output)
    row = resolve(target)
    check_precision(precision, row)
    settings = Tuning(tuning, rpc, key)
    if tune is not None:
        parse_budget(tune)
    asked = tuning is not None or tune is not None
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
    import graphopt as go

    with step(f"compiling for {row.name}"):
        artifact: Any = go.compile(
            program,
            target,
            tune=tune,
            threads=threads,
            tuning=settings if asked else None,
            precision=precision,
        )
    artifact.save(output)
    manifest = artifact.manifest
    summary = {
        "output": str(output),
        "bytes": output.stat().st_size,
        "target": manifest.target,
        "threads": manifest.threads,
        "precision": artifact.report.precision,
        "kernels": len(manifest.kernels),
        "report": dict(manifest.report),
    }
    if json:
        print_json(summary)
        return
    print(
        f"{output}: {size(summary['bytes'])}, target {manifest.target}, "
        f"{len(manifest.kernels)} kernels, {manifest.threads} thread(s), floats in {artifact.report.precision}"
    )
    print(f"images: {artifact.report.images}")
    for node, reason in artifact.report.float_layers:
        print(f"{node} stays float: {reason}")
