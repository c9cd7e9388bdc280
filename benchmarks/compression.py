"""What every family of compression passes does to one network on Fashion-MNIST: accuracy, size and speed.

A row is a recipe: the rewrite, then training, then the compiled file. Finished rows are kept in compression.json and never
measured again; an interrupted training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import Batches
from recipes import EPOCHS, ROWS, Bench, Row

import graphopt as go
from graphopt import models, passes
from graphopt.bench import charts, markdown
from graphopt.bench.timing import time_interleaved
from graphopt.errors import ArtifactError, BenchmarkError
from graphopt.files import atomic_write

log = logging.getLogger(__name__)

# Page -> section -> the rows that it shows beside the whole network.
PAGES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "factorize.md": {
        name: (name,)
        for name in (
            "low-rank-linear",
            "spatial-svd",
            "tucker-conv",
            "cp-conv",
            "flattened-conv",
            "depthwise-separable",
        )
    },
    "compact.md": {
        "squeeze-substitute": ("squeeze-substitute", "fire-low-rank"),
        "one-by-one-substitute": ("one-by-one-substitute",),
        "inception-factorize": ("inception-factorize",),
    },
    "prune.md": {
        "prune": (
            "prune-element",
            "prune-once",
            "prune-obd",
            "prune-sensitivity",
            "prune-block",
            "prune-2-4",
            "prune-filter",
        )
    },
    "channels.md": {"channels": ("prune-channel", "prune-activation")},
    "recover.md": {"chain": ("prune-block", "int8", "chain")},
}
_TEST_BATCH = 250
# Of the largest logit: float kernels order their sums in their own way. Integer layers differ in no bit, and what is float
# around them rounds at most one step of the last layer's scale the other way.
_AGREEMENT = 1e-3


def _compile(program: go.Program, path: Path) -> go.Artifact:
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
    """Everything about one row but its time. The program is kept, to be compiled again by another graphopt."""
    row = ROWS[key]
    rewritten = row.make(bench)
    program = row.recovered(bench, key, rewritten)
    models.save_program(program, bench.folder / f"{key}.pt2")
    stats = program.stats()
    return {
        "rewritten": _accuracy(bench, rewritten),
        "recovered": _accuracy(bench, program),
        "parameters": stats.nonzero,
        "macs": stats.macs // len(program.example_inputs[0]),
        **compiled(bench, key, program),
    }


def compiled(bench: Bench, key: str, program: go.Program | None = None) -> dict[str, Any]:
    """The compiled file of a row that has learned, its program from there where none is given. Raises BenchmarkError where it and its program do not agree."""
    if program is None:
        program = models.read_program(str(bench.folder / f"{key}.pt2"), trust=True)
    path = bench.folder / f"{key}.gopt"
    artifact = _compile(program, path)
    accuracy, difference = _agreement(bench, artifact, go.load(path))
    if difference > _AGREEMENT:
        raise BenchmarkError(
            f"row {key}: the compiled file's logits differ from its program's by {difference:.1e} of the largest"
        )
    return {"compiled": accuracy, "difference": difference, "bytes": path.stat().st_size}


def _is_stale(path: Path) -> bool:
    """True for a file that this graphopt does not read."""
    try:
        go.load(path)
    except ArtifactError:
        return True
    return False


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
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training after a rewrite")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--compile", action="store_true", help="compile again what has learned")
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
    held = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, Any] = {key: result for key, result in held.items() if key in ROWS}
    bench = Bench(options.output / "fashion", options.epochs)
    if options.fresh:
        _forget(bench, keys, results)
    for key, result in results.items():
        if options.compile or _is_stale(bench.folder / f"{key}.gopt"):
            log.info("compiling %s", key)
            result |= compiled(bench, key)
            _write(path, results)
    for key in keys:
        if key in results:
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
        _renew_pages(options.document.parent, results)
    print("\n".join(lines).strip())


def _forget(bench: Bench, keys: Iterable[str], results: dict[str, Any]) -> None:
    """Rows and the trainings that led to them."""
    for key in keys:
        results.pop(key, None)
        (bench.folder / f"{key}.checkpoint").unlink(missing_ok=True)


def _renew_pages(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Each family's page shows its own rows beside the whole network."""
    for page, sections in PAGES.items():
        for section, keys in sections.items():
            shown = {key: results[key] for key in ("float", *keys) if key in results}
            if len(shown) > 1:
                markdown.replace_section(folder / page, section, ["", *table(shown), ""])


def _write(path: Path, results: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1).encode())


def _points(results: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Accuracy against KiB and microseconds, by recipe."""
    return {
        row.title: (
            results[key]["bytes"] / 1024,
            results[key]["microseconds"],
            results[key]["compiled"],
        )
        for key, row in ROWS.items()
        if key in results
    }


if __name__ == "__main__":
    main()
