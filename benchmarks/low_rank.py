"""Does low rank pay: layers of ResNets, whole and factored, compiled and timed in turns.

``python benchmarks/low_rank.py --networks resnet18,resnet50 --output bench-out/low-rank``: each distinct convolution and
linear layer with a ReLU behind it, in float32 and int8, under the factorizations that apply, at ranks that leave the given
shares of its MACs. A layer's time is that of its kernels in a running session (one thread, fastest of many, whole and
factored in turns); what stands around them (quantization and layout of the inputs) is in neither time. The efficiency is the
speed-up as a share of the ratio of MACs. Compiled layers and finished rows are kept in the output folder: an interrupted run
goes on, and ``--prepare`` only compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from graphopt.bench import markdown, time_kernels
from graphopt.bench.report import machine_name
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write
from graphopt.passes.patches import each
from graphopt.progress import track
from graphopt.torchvision_import import torchvision_models

log = logging.getLogger("low_rank")

PRECISIONS = ("float32", "int8")
POINTWISE = ("low-rank-linear",)
SPATIAL = ("spatial-svd", "tucker-conv", "cp-conv", "depthwise-separable")
_GOAL = 0.7  # of the ratio of MACs, from a ratio of 2 on
_LEAST = 2.0
_ROUNDS = 5
_RUNS = 20


@dataclass(frozen=True)
class Shape:
    """A layer without its weights: a linear one has neither kernel nor size."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.kernel:
            return f"linear {self.inputs}->{self.outputs}"
        kernel, size = ("x".join(map(str, sides)) for sides in (self.kernel, self.size))
        stride = "" if max(self.stride) == 1 else f" /{self.stride[0]}"
        return f"{kernel} {self.inputs}->{self.outputs}{stride} at {size}"

    def program(self) -> go.Program:
        """The layer and a ReLU, with random weights, on a random input that a ReLU has passed."""
        torch.manual_seed(0)
        layer: nn.Module = nn.Linear(self.inputs, self.outputs)
        if self.kernel:
            geometry = (self.kernel, self.stride, self.padding)
            layer = nn.Conv2d(self.inputs, self.outputs, *geometry)  # type: ignore[arg-type]
        x = torch.randn(1, self.inputs, *self.size).relu()
        return go.capture(nn.Sequential(layer, nn.ReLU()).eval(), (x,))


def shapes(network: str) -> Iterator[Shape]:
    """The distinct ungrouped convolutions and linear layers of a torchvision network at 224 x 224."""
    model = torchvision_models().get_model(network, weights=None).eval()
    program = go.capture(model, (torch.zeros(1, 3, 224, 224),))
    found: dict[Shape, None] = {}
    for node in program.graph.nodes:
        if not go.ops.is_op(node, "conv2d", "linear"):
            continue
        arguments = go.ops.bind(node)
        outputs, inputs, *kernel = arguments["weight"].meta["val"].shape
        if not kernel:
            found[Shape(inputs, outputs)] = None
        elif arguments["groups"] == 1:
            stride, padding = (tuple(each(arguments[key], 2)) for key in ("stride", "padding"))
            size = tuple(arguments["input"].meta["val"].shape[2:])
            found[Shape(inputs, outputs, tuple(kernel), stride, padding, size)] = None
    yield from found


@dataclass(frozen=True)
class Case:
    """A layer, factored by ``factorization`` to a share of its MACs; whole without one."""

    shape: Shape
    precision: str
    factorization: str = ""
    share: float = 1.0

    @property
    def key(self) -> str:
        text = repr(dataclasses.astuple(self))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def compiled(self, folder: Path) -> Path | None:
        """The compiled layer, from the folder where it is there; None where the factorization declines."""
        path = folder / f"{self.key}.gopt"
        declined = path.with_suffix(".declined")
        if declined.exists():
            return None
        if path.exists():
            return path
        program = self.shape.program()
        if self.factorization:
            make = go.registry.get(self.factorization)
            program = make(rank={"macs": self.share})(program)  # type: ignore[call-arg]
            if not program.history[-1].rewrites:
                declined.write_text(program.history[-1].declines[0][1])
                return None
        if self.precision == "int8":
            program = go.passes.Quantize(calibration=[program.example_inputs[0]])(program)
        go.compile(program, threads=1).save(path)
        return path


def cases(shape: Shape, precision: str, passes: list[str], shares: list[float]) -> list[Case]:
    applicable = SPATIAL if math.prod(shape.kernel) > 1 else POINTWISE
    return [Case(shape, precision, p, s) for p in passes if p in applicable for s in shares]


class Timed:
    """A compiled layer at work: the kernels that hold its MACs, and those between them."""

    def __init__(self, path: Path) -> None:
        self.session = go.load(path)
        spec = self.session.manifest.inputs[0]
        generator = np.random.default_rng(0)
        shape = [int(size) for size in spec.shape]  # type: ignore[arg-type]
        self.x = np.maximum(generator.standard_normal(shape, dtype=np.float32), 0)
        self.fastest = math.inf
        self.kernels: list[str] = []
        self.macs = 0

    def measure(self) -> None:
        """Run once more; the fastest sum of the fastest calls counts."""
        rows = time_kernels(self.session, (self.x,), _RUNS)
        working = [index for index, row in enumerate(rows) if row.macs]
        layer = rows[working[0] : working[-1] + 1]
        self.kernels = [row.kernel.name.rpartition("_")[0] for row in layer]
        self.macs = sum(row.macs or 0 for row in layer)
        self.fastest = min(self.fastest, sum(row.fastest for row in layer))


def measure(case: Case, whole: Path, factored: Path) -> dict[str, Any]:
    """A row: both times, in turns."""
    rivals = Timed(whole), Timed(factored)
    for _ in range(_ROUNDS):
        for rival in rivals:
            rival.measure()
    before, after = rivals
    speed_up, ratio = before.fastest / after.fastest, before.macs / after.macs
    layers = [entry for record in after.session.manifest.history for entry in record["layers"]]
    return {
        "layer": str(case.shape),
        "precision": case.precision,
        "pass": case.factorization,
        "share": case.share,
        "rank": layers[0]["text"].removeprefix("rank "),
        "macs": [before.macs, after.macs],
        "macs_ratio": ratio,
        "seconds": [before.fastest, after.fastest],
        "speed_up": speed_up,
        "efficiency": speed_up / ratio,
        "kernels": [before.kernels, after.kernels],
    }


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The geometric mean of the efficiency from a ratio of MACs of 2 on: of all, by precision, by pass."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["macs_ratio"] < _LEAST:
            continue
        for name in ("all", row["precision"], f"{row['precision']} {row['pass']}"):
            groups.setdefault(name, []).append(math.log(row["efficiency"]))
    return {name: math.exp(statistics.fmean(logs)) for name, logs in sorted(groups.items())}


def table(rows: list[dict[str, Any]]) -> list[str]:
    titles = ("layer", "pass", "rank", "type", "MACs", "us", "us after", "faster", "efficiency")
    cells = [
        (
            row["layer"],
            row["pass"],
            row["rank"],
            row["precision"],
            f"/ {row['macs_ratio']:.2f}",
            *(f"{1e6 * seconds:.1f}" for seconds in row["seconds"]),
            f"{row['speed_up']:.2f}",
            f"{row['efficiency']:.2f}",
        )
        for row in rows
    ]
    return markdown.table(titles, cells)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {value:.2f} of the ratio of MACs{'' if value >= _GOAL else f', below {_GOAL}'}"
        for name, value in means(rows).items()
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", default="resnet18,resnet50")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--passes", default="low-rank-linear,spatial-svd,tucker-conv")
    parser.add_argument("--shares", default="0.48,0.24", help="of a layer's MACs that remain")
    parser.add_argument("--output", type=Path, default=Path("bench-out/low-rank"))
    parser.add_argument("--prepare", action="store_true", help="compile, and measure nothing")
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    options = parser.parse_args()
    for given, known in (("passes", POINTWISE + SPATIAL), ("precisions", PRECISIONS)):
        unknown = set(getattr(options, given).split(",")) - set(known)
        if unknown:
            raise BenchmarkError(f"{given}: {min(unknown)!r} is none of {', '.join(known)}")
    return options


def main() -> None:
    options = _arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    found = dict.fromkeys(s for name in options.networks.split(",") for s in shapes(name))
    shares = [float(share) for share in options.shares.split(",")]
    passes, precisions = options.passes.split(","), options.precisions.split(",")
    wanted = [c for s in found for p in precisions for c in cases(s, p, passes, shares)]
    pairs = []
    for case in track(wanted, "compiling", len(wanted)):
        factored = case.compiled(folder)
        whole = Case(case.shape, case.precision).compiled(folder)
        if factored is not None and whole is not None:
            pairs.append((case, whole, factored))
    if options.prepare:
        return
    results = folder / "low_rank.json"
    held = json.loads(results.read_text())["rows"] if results.exists() else {}
    for case, whole, factored in track(pairs, "timing", len(pairs)):
        if case.key in held:
            continue
        held[case.key] = measure(case, whole, factored)
        rows = list(held.values())
        body = {"machine": machine_name(), "efficiency": means(rows), "rows": held}
        with atomic_write(results) as file:
            file.write(json.dumps(body, indent=1).encode())
    rows = [held[case.key] for case, _, _ in pairs]
    means_lines = [f"- {line}" for line in summary(rows)]
    if options.document is not None:
        head = ["", markdown.command_line("benchmarks/low_rank.py"), ""]
        head += [f"{markdown.machine_line(machine_name())}, one thread.", "", *means_lines, ""]
        title = f"<summary>{len(rows)} factored layers</summary>"
        folded = ["<details>", title, "", *table(rows), "", "</details>", ""]
        markdown.replace_section(options.document, "low rank", [*head, *folded])
    print("\n".join([*table(rows), "", *means_lines]))


if __name__ == "__main__":
    main()
