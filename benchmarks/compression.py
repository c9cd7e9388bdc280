"""What every family of compression passes does to one network on Fashion-MNIST: accuracy, size and speed.

A row is a recipe: the rewrite, then training, then the compiled file. Finished rows are kept in compression.json and never
measured again; an interrupted training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import Batches, Images, schedule, trained

import graphopt as go
from graphopt import passes
from graphopt.bench import charts, markdown
from graphopt.bench.timing import time_interleaved
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write

log = logging.getLogger(__name__)

_EPOCHS = 2
_FEW = 8  # batches that scores, least squares and calibration look at
_TEST_BATCH = 250
# Of the largest logit: float kernels order their sums in their own way. Integer layers differ in no bit, and what is float
# around them rounds at most one step of the last layer's scale the other way.
_AGREEMENT = 1e-3


@dataclass
class Bench:
    """The network, its data, and where results are kept."""

    folder: Path
    epochs: int = _EPOCHS

    @cached_property
    def network(self) -> go.Program:
        return trained(self.folder)

    @cached_property
    def learning(self) -> Batches:
        return Batches(Images.read("train"), augment=True)

    @cached_property
    def few(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some batches of inputs and labels."""
        images = Images.read("train")
        count = _FEW * 128
        return list(Batches(Images(images.pixels[:count], images.labels[:count])))

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        return [inputs for inputs, _ in self.few]

    @cached_property
    def test(self) -> Images:
        return Images.read("t10k")

    def options(self, key: str, rate: float, times: int) -> dict[str, Any]:
        """How a compressed network trains: SGD with a cosine, resumed after an interruption."""
        epochs = times * self.epochs
        return {
            "epochs": epochs,
            "optimizer": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=2e-4),
            "scheduler": lambda optimizer: schedule(optimizer, epochs),
            "clip_norm": 5.0,
            "checkpoint": self.folder / f"{key}.checkpoint",
        }


Make = Callable[[Bench], go.Program]
Recover = Callable[[Bench, str, go.Program], go.Program]


def fine_tune(rate: float = 0.03, times: int = 1) -> Recover:
    """Learn from the labels, ``times`` the usual epochs."""
    return lambda bench, key, program: go.fine_tune(
        program, bench.learning, **bench.options(key, rate, times)
    )


def distill(rate: float = 0.1, times: int = 4) -> Recover:
    """Learn from the labels and from what the whole network says."""
    return lambda bench, key, program: go.distill(
        program, bench.network, bench.learning, 0.3, 4.0, **bench.options(key, rate, times)
    )


def _gradually(prune: passes.Prune) -> Recover:
    def recover(bench: Bench, key: str, program: go.Program) -> go.Program:
        pruner = passes.GradualPruner(prune)
        return go.fine_tune(program, bench.learning, pruner=pruner, **bench.options(key, 0.05, 2))

    return recover


@dataclass(frozen=True)
class Goal:
    """At most ``drop`` points of accuracy lost, and at most these shares of the network's left."""

    drop: float
    parameters: float = 1.0
    macs: float = 1.0

    def __str__(self) -> str:
        shares = [("parameters", self.parameters), ("MACs", self.macs)]
        texts = [f"{1 / share:.3g}x fewer {name}" for name, share in shares if share < 1]
        return ", ".join([f"-{self.drop:g}", *texts])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    make: Make
    recover: Recover | None = field(default_factory=fine_tune)
    goal: Goal | None = None


def _pass(make: Callable[[Bench], go.Pass]) -> Make:
    return lambda bench: make(bench)(bench.network)


def _pruned(granularity: Any, sparsity: float, **options: Any) -> Make:
    schedule = options.pop("schedule", None) or passes.Global(sparsity)
    return _pass(
        lambda bench: passes.Prune(
            schedule=schedule,
            granularity=granularity,
            calibration=bench.calibration,
            data=bench.few,
            **options,
        )
    )


def _integer(bench: Bench, program: go.Program) -> go.Program:
    """Masks stay: what is pruned is 0 in int8 too."""
    folded = go.passes.FoldBatchNorm()(program)
    return passes.Quantize(calibration=bench.calibration)(folded)


def _chain(bench: Bench) -> go.Program:
    """Blocks of four pruned and recovered, then int8, which the row's distillation trains."""
    pruned = _pruned(passes.Block(), 0.8)(bench)
    return _integer(bench, distill()(bench, "chain-pruned", pruned))


def _squeeze(bench: Bench) -> go.Pass:
    """Fire modules in place of all 3 x 3 layers but the first."""
    return passes.SqueezeSubstitute(squeeze=0.125, exclude=("0",), calibration=bench.calibration)


def _fire(bench: Bench) -> go.Program:
    """Fire modules, and half a linear layer: of what they leave, it holds six parts of seven."""
    return passes.LowRankLinear(rank={"parameters": 0.5})(_squeeze(bench)(bench.network))


_GRADUAL = passes.Prune(schedule=passes.Gradual(0.9, updates=28, every=50))
_THIRD = {"macs": 1 / 3}

ROWS: Mapping[str, Row] = {
    "float": Row("whole network", lambda bench: bench.network, None),
    "int8": Row("quantize", lambda bench: _integer(bench, bench.network), None),
    "low-rank-linear": Row(
        "low-rank-linear", _pass(lambda b: passes.LowRankLinear(rank={"parameters": 0.6}))
    ),
    "spatial-svd": Row(
        "spatial-svd",
        _pass(lambda b: passes.SpatialSvd(rank=_THIRD, calibration=b.calibration)),
        distill(),
        Goal(0.7, macs=1 / 3),
    ),
    "tucker-conv": Row(
        "tucker-conv",
        _pass(lambda b: passes.TuckerConv(rank=_THIRD)),
        distill(),
        Goal(0.7, macs=1 / 3),
    ),
    "cp-conv": Row("cp-conv", _pass(lambda b: passes.CpConv(rank=_THIRD))),
    "flattened-conv": Row(
        "flattened-conv", _pass(lambda b: passes.FlattenedConv(rank={"macs": 0.5}))
    ),
    "depthwise-separable": Row(
        "depthwise-separable",
        _pass(lambda b: passes.DepthwiseSeparable(rank=1, calibration=b.calibration)),
    ),
    "squeeze-substitute": Row("squeeze-substitute", _pass(_squeeze)),
    "fire-low-rank": Row(
        "squeeze-substitute, low-rank-linear", _fire, distill(), Goal(1.0, parameters=1 / 3)
    ),
    "one-by-one-substitute": Row(
        "one-by-one-substitute",
        _pass(lambda b: passes.OneByOneSubstitute(share=0.5, calibration=b.calibration)),
    ),
    "inception-factorize": Row(
        "inception-factorize",
        _pass(lambda b: passes.InceptionFactorize(calibration=b.calibration)),
    ),
    "prune-element": Row(
        "prune: elements, 90 %",
        _pruned(passes.Element(), 0.9),
        distill(),
        Goal(0.5, parameters=0.1),
    ),
    "prune-block": Row(
        "prune: 1x4 blocks, 80 %",
        _pruned(passes.Block(), 0.8),
        distill(),
        Goal(0.5, parameters=0.2),
    ),
    "prune-2-4": Row("prune: 2:4", _pruned(passes.NM(), 0.5, schedule=passes.PerLayer())),
    "prune-filter": Row(
        "prune: filters, 30 %, by batch norm",
        _pruned(passes.Filter(), 0.3, score=passes.BatchNormScale()),
    ),
    "prune-channel": Row(
        "prune: channels, by Taylor",
        _pruned(passes.Channel(multiple=4), 0.5, score=passes.Taylor()),
        distill(),
        Goal(0.5, macs=0.5),
    ),
    "prune-obd": Row(
        "prune: elements, 90 %, OBD", _pruned(passes.Element(), 0.9, score=passes.Obd())
    ),
    "prune-activation": Row(
        "prune: channels, by activation",
        _pruned(passes.Channel(multiple=4), 0.5, score=passes.Activation()),
    ),
    "prune-sensitivity": Row(
        "prune: elements, 90 %, by sensitivity",
        _pruned(passes.Element(), 0.9, schedule=passes.Sensitivity(0.9)),
    ),
    "prune-gradual": Row(
        "prune: elements, 90 %, gradually",
        lambda bench: _GRADUAL(bench.network),
        _gradually(_GRADUAL),
    ),
    "chain": Row(
        "1x4 blocks 80 %, int8, distilled", _chain, distill(0.005, 1), Goal(0.7, parameters=0.2)
    ),
}


def _compiled(program: go.Program, path: Path) -> go.Artifact:
    """Masks multiplied in and batch norm folded: what a user compiles."""
    for finish in (passes.ApplyMasks(), passes.FoldBatchNorm()):
        program = finish(program)
    artifact = go.compile(program)
    artifact.save(path)
    return artifact


def _accuracy(bench: Bench, program: go.Program) -> float:
    result = go.evaluate(program, Batches(bench.test, _TEST_BATCH))
    return 100 * float(result.score or 0)


def _agreement(bench: Bench, artifact: go.Artifact, session: go.Session) -> tuple[float, float]:
    """Accuracy of the compiled file, and how far its logits are from its program's, of the largest."""
    right, worst, largest = 0, 0.0, 0.0
    for pixels, labels in Batches(bench.test, _TEST_BATCH):
        ours = session(pixels.numpy())
        with torch.no_grad():
            theirs = artifact.program(pixels).numpy()
        right += int((ours.argmax(axis=1) == labels.numpy()).sum())
        worst = max(worst, float(np.abs(ours - theirs).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    return 100 * right / len(bench.test.labels), worst / largest


def measure(bench: Bench, key: str) -> dict[str, Any]:
    """Everything about one row. Raises BenchmarkError where the compiled file and its program do not agree."""
    row = ROWS[key]
    rewritten = row.make(bench)
    before = _accuracy(bench, rewritten)
    program = rewritten if row.recover is None else row.recover(bench, key, rewritten)
    path = bench.folder / f"{key}.gopt"
    artifact = _compiled(program, path)
    session = go.load(path)
    accuracy, difference = _agreement(bench, artifact, session)
    if difference > _AGREEMENT:
        raise BenchmarkError(
            f"row {key}: the compiled file's logits differ from its program's by {difference:.1e} of the largest"
        )
    stats = program.stats()
    return {
        "rewritten": before,
        "recovered": _accuracy(bench, program),
        "compiled": accuracy,
        "difference": difference,
        "parameters": stats.nonzero,
        "macs": stats.macs // len(program.example_inputs[0]),
        "bytes": path.stat().st_size,
    }


def time_all(bench: Bench, keys: Iterable[str]) -> dict[str, float]:
    """Microseconds a run of each compiled file at batch 1, one thread, in turns."""
    image = bench.test.pixels[:1].numpy()
    sessions = {key: go.load(bench.folder / f"{key}.gopt", threads=1) for key in keys}
    calls = {key: partial(session, image) for key, session in sessions.items()}
    timings = time_interleaved(calls, seconds=0.5)
    return {key: 1e6 * timing.median for key, timing in timings.items()}


def verdict(row: Row, result: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Whether a row's goal is reached; a percent of the parameters is left to biases and batch norm."""
    if row.goal is None:
        return ""
    dropped = whole["compiled"] - result["compiled"]
    kept = result["parameters"] / whole["parameters"] <= row.goal.parameters + 0.01
    cheap = result["macs"] / whole["macs"] <= row.goal.macs * 1.001
    return "yes" if dropped <= row.goal.drop and kept and cheap else "no"


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the Markdown table."""
    whole = results["float"]
    titles = ["recipe", "rewritten", "recovered", "compiled", "parameters", "MMACs"]
    titles += ["KiB", "us", "speedup", "goal", "met"]
    rows = []
    for key, row in ROWS.items():
        if key not in results:
            continue
        result = results[key]
        accuracies = [f"{result[name]:.2f}" for name in ("rewritten", "recovered", "compiled")]
        rows.append(
            [
                row.title,
                *accuracies,
                f"{result['parameters'] / 1e3:.0f}k",
                f"{result['macs'] / 1e6:.2f}",
                f"{result['bytes'] / 1024:.0f}",
                f"{result['microseconds']:.0f}",
                f"{whole['microseconds'] / result['microseconds']:.2f}",
                str(row.goal or ""),
                verdict(row, result, whole),
            ]
        )
    return markdown.table(titles, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--epochs", type=int, default=_EPOCHS, help="of training after a rewrite")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    return parser


def main() -> None:
    options = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in (__name__, "fashion"):
        logging.getLogger(name).setLevel(logging.INFO)
    keys = list(dict.fromkeys(["float", *options.rows.split(",")]))
    for key in keys:
        if key not in ROWS:
            raise BenchmarkError(f"unknown row {key!r}; known are {', '.join(ROWS)}")
    path = options.output / "compression.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    bench = Bench(options.output / "fashion", options.epochs)
    for key in keys:
        if key in results and not options.fresh:
            continue
        log.info("measuring %s", key)
        results[key] = measure(bench, key)
        _write(path, results)
    log.info("timing %d files in turns", len(results))
    for key, microseconds in time_all(bench, results).items():
        results[key]["microseconds"] = microseconds
    _write(path, results)
    lines = ["", markdown.command_line("benchmarks/compression.py"), "", *table(results), ""]
    charts.trade_offs(options.output / "compression.svg", _points(results))
    if options.document is not None:
        markdown.replace_section(options.document, "compression", lines)
    print("\n".join(lines).strip())


def _write(path: Path, results: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1).encode())


def _points(results: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Accuracy against KiB and microseconds, by recipe."""
    return {
        ROWS[key].title: (result["bytes"] / 1024, result["microseconds"], result["compiled"])
        for key, result in results.items()
    }


if __name__ == "__main__":
    main()
