"""``graphopt bench``: how long a ``.gopt`` takes, kernel by kernel, and beside its peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, print_rich, step
from graphopt.cli.data import run_inputs
from graphopt.cli.images import Normalization

if TYPE_CHECKING:
    import numpy as np

    from graphopt.bench import Comparison
    from graphopt.manifest import TensorSpec
    from graphopt.session import Session

    Array = np.ndarray[Any, Any]


def _made_up(spec: TensorSpec, generator: np.random.Generator) -> Array:
    """Standard normal values, or ones for integers; the smallest batch of a range."""
    import numpy as np

    shape = [size if isinstance(size, int) else size.low for size in spec.shape]
    if spec.dtype.startswith("float"):
        return generator.standard_normal(shape).astype(spec.dtype)
    return np.ones(shape, spec.dtype)


def _inputs(
    session: Session, given: Sequence[str], normalization: Normalization
) -> tuple[Array, ...]:
    import numpy as np

    specs = session.manifest.inputs
    if given:
        return tuple(run_inputs(given, specs, normalization))
    generator = np.random.default_rng(0)
    return tuple(_made_up(spec, generator) for spec in specs)


def command(
    model: Annotated[Path, typer.Argument(help="A compiled model (.gopt).")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="PEERS",
            help="Peers between commas: torch, torch.compile, onnxruntime, onnxruntime-int8, openvino, openvino-int8.",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--model", help="The float model that the peers run: package.module:factory or .pt2."
        ),
    ] = None,
    weights: options.Weights = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="[NAME=]FILE", help="Inputs to run on; random without it."
        ),
    ] = None,
    threads: options.Threads = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="How long to measure each rival.")
    ] = 2.0,
    rows: Annotated[
        int, typer.Option("--kernels", min=0, help="How many of the slowest kernels to show.")
    ] = 20,
    image_mean: options.Mean = "0.485,0.456,0.406",
    image_std: options.Deviation = "0.229,0.224,0.225",
    trust: options.Trust = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure latency and a row a kernel; with --against, the peers in turns with it.

    The int8 peers calibrate on the inputs of the measurement: their speed counts here, not their accuracy.

    \b
    graphopt bench tiny.gopt
    graphopt bench tiny.gopt --against torch,onnxruntime --model nets:tiny --threads 1
    graphopt bench tiny.gopt --json --kernels 5
    """
    if against and not original:
        fail("--against needs --model: the float model that the peers run", code=2)
    from graphopt.artifact import load
    from graphopt.bench import benchmark

    peers = [name.strip() for name in against.split(",")] if against else []
    if peers:
        from graphopt.bench.peers import check_peers

        check_peers(peers, calibrated=True)
    session = load(model, threads)
    normalization = Normalization(
        options.parse_channels("--image-mean", image_mean),
        options.parse_channels("--image-std", image_std),
    )
    arrays = _inputs(session, inputs or (), normalization)
    with step("measuring"):
        report = benchmark(session, arrays, seconds=seconds)
    comparison: Comparison | None = None
    if peers and original:
        comparison = _compare(
            session, arrays, peers, original, str(weights) if weights else None, trust, seconds
        )
    if json:
        kernels = {row.index for row in report.slowest(rows)}
        body = report.to_json()
        body["kernels"] = [row for row in body["kernels"] if row["index"] in kernels]
        print_json({**body, "comparison": comparison.to_json() if comparison else None})
        return
    print_rich(report.table(rows))
    if comparison:
        print_rich(comparison.table())


def _compare(
    session: Session,
    arrays: tuple[Array, ...],
    peers: Sequence[str],
    original: str,
    weights: str | None,
    trust: bool,
    seconds: float,
) -> Comparison:
    from graphopt.bench.peers import compare
    from graphopt.models import load_model, read_program

    model: Any = (
        read_program(original, trust=trust)
        if original.endswith(".pt2")
        else load_model(original, weights=weights, trust=trust)
    )
    with step(f"measuring against {', '.join(peers)}"):
        return compare(
            {"graphopt": lambda: session(*arrays)},
            peers,
            model,
            arrays,
            calibration=[arrays],
            threads=session.threads,
            seconds=seconds,
        )
