"""``graphopt run``: a ``.gopt`` on arrays or images from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.console import fail, print_json, print_table
from graphopt.cli.data import run_inputs
from graphopt.cli.images import Normalization
from graphopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_FORMATS = (".npy", ".npz")


def _leaves(value: Any) -> list[Array]:
    """The arrays of a nested output, in order."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if hasattr(value, "dtype") else []


def _save(path: Path, arrays: list[Array]) -> None:
    import numpy as np

    from graphopt.files import atomic_write

    with atomic_write(path) as file:
        if path.suffix == ".npy":
            np.save(file, arrays[0])
        else:
            named: dict[str, Any] = {f"output{i}": array for i, array in enumerate(arrays)}
            np.savez(file, **named)


def _top(array: Array, count: int) -> list[dict[str, Any]]:
    """The largest values of each row, with their indices."""
    rows = array.reshape(-1, array.shape[-1])
    best = (-rows).argsort(axis=1, kind="stable")[:, :count]
    return [
        {"row": row, "index": int(index), "value": float(rows[row, index])}
        for row in range(len(rows))
        for index in best[row]
    ]


def command(
    model: Annotated[
        Path, typer.Argument(help="A compiled model (.gopt): native code, so trust it.")
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="[NAME=]FILE", help="A .npy, .npz or image; repeatable."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the result (.npy, .npz).")
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=1, help="How many of the largest values to print.")
    ] = 5,
    threads: options.Threads = None,
    image_mean: options.Mean = "0.485,0.456,0.406",
    image_std: options.Deviation = "0.229,0.224,0.225",
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a compiled model and save its outputs, or print the largest values.

    \b
    graphopt run tiny.gopt --input x.npy --output y.npy
    graphopt run tiny.gopt --input cat.jpg --top 3
    graphopt run bert.gopt --input ids=ids.npy --input mask=mask.npy --output y.npz
    """
    if output is not None:
        if output.suffix not in _FORMATS:
            fail(f"--output {output} must end in .npy or .npz", code=2)
        from graphopt.artifact import check_writable

        check_writable(output)
    from graphopt.artifact import load

    session = load(model, threads)
    normalization = Normalization(
        options.parse_channels("--image-mean", image_mean),
        options.parse_channels("--image-std", image_std),
    )
    arrays = run_inputs(inputs, session.manifest.inputs, normalization)
    results = _leaves(session(*arrays))
    if output is not None:
        if output.suffix == ".npy" and len(results) != 1:
            raise InputError(f"the model has {len(results)} outputs; write them to a .npz")
        _save(output, results)
    ranked = [_top(array, top) if array.ndim and array.size else [] for array in results]
    if json:
        described = [
            {"shape": list(array.shape), "dtype": str(array.dtype), "top": best}
            for array, best in zip(results, ranked, strict=True)
        ]
        print_json({"outputs": described, "output": str(output) if output else None})
        return
    for index, (array, best) in enumerate(zip(results, ranked, strict=True)):
        title = f"output {index}: {array.dtype} {list(array.shape)}"
        if output is not None or not best or array.ndim > 2:
            print(title)
            continue
        print_table(
            title, ("row", "index", "value"), [(b["row"], b["index"], b["value"]) for b in best]
        )
    if output is not None:
        print(f"written to {output}")
