"""``graphopt inspect``: what is in a ``.gopt`` or a ``.pt2``, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.console import LAYER_COLUMNS, layer_rows, print_json, print_table, size

_LARGEST = 20


def command(
    model: Annotated[Path, typer.Argument(help="A compiled model (.gopt) or a program (.pt2).")],
    trust: options.Trust = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer and kernel, not only the first 20.")
    ] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's inputs, outputs, history, stats and kernels. A .gopt is checked, never run.

    \b
    graphopt inspect tiny.gopt
    graphopt inspect tiny.gopt --json
    graphopt inspect tiny.pt2 --trust --all
    """
    report = _program(model, trust) if model.suffix == ".pt2" else _artifact(model)
    if json:
        print_json(report)
        return
    most = None if everything else _LARGEST
    for key in ("target", "features", "threads", "file", "versions"):
        if key in report:
            print(f"{key}: {_line(key, report[key])}")
    if "images" in report.get("report", {}):
        print(f"images: {report['report']['images']}")
    if "precision" in report.get("report", {}):
        print(f"floats: {report['report']['precision']}")
    print_table("inputs and outputs", ("name", "type"), _ports(report))
    print_table("history", *_history(report["history"]))
    changed = layer_rows(report["history"])[:most]
    if changed:
        print_table("layers that passes changed", LAYER_COLUMNS, changed)
    stats = report["stats"]
    totals = [(key, value) for key, value in stats.items() if not isinstance(value, list | dict)]
    print_table("stats", ("what", "total"), totals)
    layers = sorted(stats.get("layers", ()), key=lambda layer: -layer["macs"])[:most]
    if layers:
        print_table("layers, by MACs", tuple(layers[0]), [tuple(row.values()) for row in layers])
    floats = report.get("report", {}).get("float_layers", ())[:most]
    if floats:
        rows = [tuple(layer.values()) for layer in floats]
        print_table("layers that stay float", ("node", "reason"), rows)
    kernels = report.get("kernels", [])[:most]
    if kernels:
        print_table("kernels, in order", tuple(kernels[0]), [tuple(k.values()) for k in kernels])


def _artifact(path: Path) -> dict[str, Any]:
    import dataclasses
    import json

    from graphopt.artifact import read_manifest

    manifest = read_manifest(path)
    body: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(manifest)))
    body["input_types"] = {spec.name: spec.describe() for spec in manifest.inputs}
    body["output_types"] = {spec.name: spec.describe() for spec in manifest.outputs}
    return {**body, "file": {"path": str(path), "bytes": path.stat().st_size}}


def _program(path: Path, trust: bool) -> dict[str, Any]:
    from graphopt.models import read_program

    program = read_program(str(path), trust=trust)
    outputs = [node for node in program.output.all_input_nodes if "val" in node.meta]
    return {
        "file": {"path": str(path), "bytes": path.stat().st_size},
        "input_types": {node.name: _described(node.meta["val"]) for node in program.inputs},
        "output_types": {node.name: _described(node.meta["val"]) for node in outputs},
        "history": [record.to_json() for record in program.history],
        "stats": program.stats().to_json(),
    }


def _described(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"


def _line(key: str, value: Any) -> str:
    if key == "file":
        return f"{value['path']}, {size(value['bytes'])}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _ports(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [*report["input_types"].items(), *report["output_types"].items()]


def _history(records: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    columns = ("pass", "contract", "rewrites", "declined", "parameters", "MACs", "error")
    rows = [
        (
            record["pass"],
            record["contract"],
            record["rewrites"],
            len(record["declines"]),
            record["parameters"][1],
            record["macs"][1],
            record["error"],
        )
        for record in records
    ]
    return columns, rows
