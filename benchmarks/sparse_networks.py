"""Whole pruned networks, sparse against dense: one program compiled twice, timed in turns.

``python benchmarks/sparse_networks.py --networks resnet50 --zeros 0.9 --threads 1,2``: every layer loses the given share of its
1 x 4 blocks (random weights, the smallest blocks), the network is quantized and compiled as it is, where the cost model
chooses the sparse layers, and with dense kernels alone (direct or Winograd). Both are run on inputs that they were not
calibrated with and must agree bit for bit. A ratio is the dense median over the sparse one. Compiled files and finished rows
are kept in the output folder: an interrupted run goes on, ``--prepare`` only compiles, ``--fresh`` begins again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import graphopt as go
from graphopt import passes
from graphopt.backends.lower import emit
from graphopt.backends.lower.sparse import Orders
from graphopt.backends.targets import TARGETS
from graphopt.bench import markdown
from graphopt.bench.networks import NETWORKS
from graphopt.bench.report import machine_name
from graphopt.bench.timing import time_interleaved
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write
from graphopt.progress import track
from graphopt.runtime import available_cpus

FORMS = ("dense", "sparse")
_SECTION = "sparse networks"


@functools.cache
def pruned(name: str, zeros: float) -> go.Program:
    """The network, pruned and quantized."""
    network = NETWORKS[name]
    inputs = network.inputs()
    prune = passes.Prune(schedule=passes.PerLayer(zeros), granularity=passes.Block(inputs=4))
    return passes.Quantize(calibration=[inputs])(prune(go.capture(network.model(), inputs)))


@dataclass(frozen=True)
class Case:
    """A network, the share of zero blocks in its layers, the target and the threads."""

    network: str
    zeros: float
    isa: str
    threads: int

    @property
    def key(self) -> str:
        return f"{self.network}-{self.zeros:g}-{self.isa}-{self.threads}"

    def compiled(self, folder: Path) -> dict[str, Path]:
        """The file of each form, from the folder where it is there."""
        return {form: self._compiled(form, folder / f"{self.key}-{form}.gopt") for form in FORMS}

    def _compiled(self, form: str, path: Path) -> Path:
        if path.exists():
            return path
        program = pruned(self.network, self.zeros)
        dense = mock.patch.object(emit, "choose_orders", return_value=Orders())
        with dense if form == "dense" else contextlib.nullcontext():
            return go.compile(program, self.isa, threads=self.threads).save(path)


def measure(case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """Milliseconds of both forms and how many layers are sparse. Raises BenchmarkError where a bit of the outputs differs."""
    sessions = {form: go.load(path) for form, path in case.compiled(folder).items()}
    arrays = [tensor.numpy() for tensor in NETWORKS[case.network].inputs()]
    unseen = [_other(array) for array in arrays]
    dense, sparse = (np.asarray(sessions[form](*unseen)) for form in FORMS)
    if not np.array_equal(dense, sparse) or dense.min() == dense.max():
        raise BenchmarkError(f"{case.key}: the outputs of the sparse and the dense file differ")
    pause = 0.002 if case.threads > 1 else 0.0
    calls = {form: lambda s=session: s(*arrays) for form, session in sessions.items()}
    timings = time_interleaved(calls, seconds=seconds, pause=pause)
    kernels = sessions["sparse"].manifest.kernels
    return {
        **asdict(case),
        "milliseconds": {form: 1e3 * timing.median for form, timing in timings.items()},
        "gain": timings["dense"].median / timings["sparse"].median,
        "layers": sum(kernel.form != "" for kernel in kernels),
        "sparse_layers": sum(kernel.form == "sparse" for kernel in kernels),
        "turned": sum(kernel.name.startswith("reorder_") for kernel in kernels),
        "bytes": {form: sum(w.nbytes for w in _weights(case, folder, form)) for form in FORMS},
    }


def _other(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An input of the same shape: the numbers of a float one in another order."""
    return np.random.default_rng(1).permuted(array) if array.dtype.kind == "f" else array


def _weights(case: Case, folder: Path, form: str) -> list[np.ndarray[Any, Any]]:
    return list(go.artifact.read_artifact(case.compiled(folder)[form]).weights.values())


def table(rows: list[dict[str, Any]]) -> list[str]:
    titles = ["network", "zero blocks", "threads", "dense ms", "sparse ms", "ratio"]
    titles += ["sparse layers", "turned", "weights MB"]
    cells = [
        (
            NETWORKS[row["network"]].title,
            f"{row['zeros']:.0%}",
            str(row["threads"]),
            *(f"{row['milliseconds'][form]:.2f}" for form in FORMS),
            f"{row['gain']:.2f}",
            f"{row['sparse_layers']} of {row['layers']}",
            str(row["turned"]),
            " / ".join(f"{row['bytes'][form] / 1e6:.1f}" for form in FORMS),
        )
        for row in rows
    ]
    return markdown.table(titles, cells)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", default="resnet50", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--zeros", default="0.9", help="shares of each layer's blocks: 0.8,0.9")
    parser.add_argument("--threads", default="1", help="one or more counts: 1,2")
    parser.add_argument("--isa", choices=("native", *TARGETS), default="native")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each file")
    parser.add_argument("--output", type=Path, default=Path("bench-out/sparse-networks"))
    parser.add_argument("--prepare", action="store_true", help="compile, and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="compile and measure everything again")
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    options = parser.parse_args()
    for name in options.networks.split(","):
        if name not in NETWORKS:
            raise BenchmarkError(f"unknown network {name!r}; known are {', '.join(NETWORKS)}")
    if max(map(int, options.threads.split(","))) > available_cpus():
        raise BenchmarkError(f"option threads: this process may use {available_cpus()} CPUs")
    return options


def main() -> None:
    options = _arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "sparse_networks.json"
    if options.fresh:
        for path in (results, *folder.glob("*.gopt")):
            path.unlink(missing_ok=True)
    cases = [
        Case(network, float(zeros), options.isa, int(threads))
        for network in options.networks.split(",")
        for zeros in options.zeros.split(",")
        for threads in options.threads.split(",")
    ]
    for case in track(cases, "compiling", len(cases)):
        case.compiled(folder)
    if options.prepare:
        return
    held = json.loads(results.read_text())["rows"] if results.exists() else {}
    for case in cases:
        if case.key not in held:
            held[case.key] = measure(case, folder, options.seconds)
            with atomic_write(results) as file:
                body = {"machine": machine_name(), "rows": held}
                file.write(json.dumps(body, indent=1).encode())
    lines = table([held[case.key] for case in cases])
    if options.document is not None:
        head = ["", markdown.command_line("benchmarks/sparse_networks.py"), ""]
        machine = [f"{markdown.machine_line(machine_name())}.", ""]
        markdown.replace_section(options.document, _SECTION, [*head, *machine, *lines, ""])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
