"""The options that several commands share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.errors import InputError

_VERBOSE = "graphopt.verbose"


def _be_verbose(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    ctx.meta[_VERBOSE] = True
    log = logging.getLogger("graphopt")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


def is_verbose(ctx: Any) -> bool:
    """Whether ``--verbose`` was given, in whichever command."""
    return bool(ctx.meta.get(_VERBOSE))


def _load_plugins(paths: list[Path] | None) -> list[Path]:
    if paths:
        from graphopt.registry import load_plugin

        for path in paths:
            load_plugin(path)
    return paths or []


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", callback=_be_verbose, help="Show the log, and tracebacks of errors."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="package.module:factory (the current folder is looked in first), or a .pt2.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A .safetensors file to load into the factory's module."),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read .pt2 and pickled files, which can run code.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="1x3x224x224",
        help="Shape of an input, with a dtype as 1x128:int64; once for each input.",
    ),
]
DynamicBatch = Annotated[
    str | None,
    typer.Option("--dynamic-batch", metavar="LOW:HIGH", help="Leave the batch open: 1:8."),
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML file with the list of passes.")
]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="NAME[:OPTION=VALUE,...]",
        help="A pass to apply, after the recipe's; may be repeated.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help="Inputs to calibrate on: a .npz, a folder of images, or package.module:factory.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Labelled data: a .npz with an array `labels`, or package.module:factory of (inputs, labels).",
    ),
]
Mean = Annotated[
    str, typer.Option("--image-mean", help="Mean of each channel of an image scaled to 0..1.")
]
Deviation = Annotated[str, typer.Option("--image-std", help="Standard deviation of each channel.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin", callback=_load_plugins, help="A Python file that registers passes; repeatable."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads the model will run on.")
]
Rpc = Annotated[
    str | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT",
        help="Measure on a remote device: the tracker of `python -m tvm.exec.rpc_tracker`. "
        "RPC gives full code execution to whoever reaches the port.",
    ),
]
DeviceKey = Annotated[
    str | None,
    typer.Option("--key", help="The device, by the key that its `rpc_server` registered."),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="float32|tf32|float16",
        help="What a GPU multiplies floats in; inputs and outputs stay float32.",
    ),
]
TargetName = Annotated[
    str, typer.Option("--target", help="A name from `graphopt targets`, or native.")
]


def parse_range(text: str | None) -> tuple[int, int] | None:
    """``"1:8" -> (1, 8)``; raises InputError."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    if not low.isdecimal() or not high.isdecimal():
        raise InputError(f"--dynamic-batch {text!r} must look like 1:8")
    return int(low), int(high)


def parse_channels(option: str, text: str) -> tuple[float, ...]:
    """``"0.5,0.5,0.5" -> (0.5, 0.5, 0.5)``; raises InputError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text!r} must be numbers between commas") from error
