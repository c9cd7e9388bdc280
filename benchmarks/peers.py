"""Whole models against other runtimes, interleaved in one process: float32 and int8, the same threads and inputs.

``python benchmarks/peers.py --models resnet50,minilm_l6 --threads 1,2 --seconds 2 --output bench-out``: tables,
``peers.json`` and a bar chart a setting (``peers-batch-1.svg``). A ratio is the median of the better of ONNX Runtime and
OpenVINO in the same precision over ours: above 1 we are faster. Weights are random where only the shapes matter for
speed, calibration is one batch of noise. Finished models are kept in the JSON file: an interrupted run goes on where it
stopped; ``--fresh`` measures them again.

``--isa avx2`` compiles ours for that row and limits the peers that can be limited; ``--batch 8`` counts milliseconds an
image; ``--dynamic`` compares our batch 1, batch 8 and batch range with each other.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import graphopt as go
from graphopt.backends.targets import TARGETS
from graphopt.bench import charts, markdown, time_interleaved
from graphopt.bench.networks import NETWORKS
from graphopt.bench.peers import PEERS, check_peers, compare
from graphopt.bench.report import machine_name
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write
from graphopt.runtime import available_cpus

# How many times faster than the better peer a model should be: int8 on 1 and on 2 threads, float32 on 1.
GOALS = MappingProxyType(
    {
        "resnet18": {("int8", 1): 1.3, ("int8", 2): 1.25, ("float32", 1): 1.05},
        "resnet50": {("int8", 1): 1.3, ("int8", 2): 1.25, ("float32", 1): 1.05},
        "mobilenet_v2": {("int8", 1): 2.0, ("int8", 2): 1.6, ("float32", 1): 1.05},
        "squeezenet1_1": {("int8", 1): 1.6, ("int8", 2): 1.4, ("float32", 1): 1.05},
        "vgg16": {("int8", 1): 1.1, ("int8", 2): 1.05, ("float32", 1): 1.1},
        "efficientnet_lite0": {("int8", 1): 1.7, ("int8", 2): 1.4, ("float32", 1): 1.05},
        "minilm_l6": {("int8", 1): 1.2, ("int8", 2): 1.1, ("float32", 1): 1.0},
    }
)
OURS = {"int8": "graphopt-int8", "float32": "graphopt"}
TORCH = ("torch", "torch.compile")
RIVALS = {
    "int8": ("onnxruntime-int8", "onnxruntime-dynamic", "openvino-int8"),
    "float32": ("onnxruntime", "openvino"),
}
DYNAMIC = ("batch 1", "batch 8", "range, 1", "range, 8")

# What keeps a peer to an instruction set; ONNX Runtime 1.31 has no such switch and always uses the best.
_LIMITS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx-vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512-vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "x86-64": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
_UNLIMITED = "Not limited to that instruction set: ONNX Runtime, which has no switch for it."

log = logging.getLogger("peers")


@dataclass(frozen=True)
class Setting:
    """One line of a table: a model, its target, batch and threads."""

    model: str
    threads: int
    batch: int = 1
    isa: str = "native"

    @property
    def key(self) -> str:
        """Its name in the JSON file."""
        return f"{self.model} {self.isa} batch {self.batch} threads {self.threads}"

    def goal(self, precision: str) -> float | None:
        """The ratio to reach; None where none is set."""
        if (self.isa, self.batch) != ("native", 1):
            return None
        return GOALS.get(self.model, {}).get((precision, self.threads))


def peers_of(model: str, peers: tuple[str, ...]) -> list[str]:
    """The peers that a model is measured against: ONNX Runtime's dynamic quantization is for transformers."""
    dynamic = NETWORKS[model].is_transformer
    return [peer for peer in peers if dynamic or peer != "onnxruntime-dynamic"]


def is_finished(result: Mapping[str, Any] | None, peers: list[str]) -> bool:
    """True where a file holds a result with every one of ``peers`` timed, or known to fail."""
    return result is not None and {*result["timings"], *result["failures"]}.issuperset(peers)


def measure(setting: Setting, seconds: float, peers: list[str]) -> dict[str, Any]:
    """Compile one model in both precisions and time it beside the peers."""
    network = NETWORKS[setting.model]
    model, inputs = network.model(), network.inputs(setting.batch)
    arrays = tuple(tensor.numpy() for tensor in inputs)
    program = go.capture(model, inputs)
    quantized = go.passes.Quantize(calibration=[inputs])(program)
    ours, compile_seconds = {}, {}
    for precision, source in (("float32", program), ("int8", quantized)):
        started = time.perf_counter()
        artifact = go.compile(source, target=setting.isa, threads=setting.threads)
        session = artifact.session(threads=setting.threads)
        compile_seconds[OURS[precision]] = time.perf_counter() - started
        ours[OURS[precision]] = lambda session=session: session(*arrays)
    comparison = compare(
        ours,
        peers,
        model,
        arrays,
        calibration=[arrays],
        threads=setting.threads,
        seconds=seconds,
        is_transformer=network.is_transformer,
    )
    body = {**comparison.to_json(), "compile_seconds": compile_seconds, **vars(setting)}
    body["versions"]["graphopt"] = go.__version__
    return body


def measure_dynamic(setting: Setting, seconds: float) -> dict[str, Any]:
    """Time our own batch 1, batch 8, and a batch range at both, in both precisions."""
    network = NETWORKS[setting.model]
    calls = {}
    for precision in OURS:
        for batch, bounds in ((1, None), (8, None), (2, (1, 8))):
            program = go.capture(network.model(), network.inputs(batch), dynamic_batch=bounds)
            if precision == "int8":
                program = go.passes.Quantize(calibration=[network.inputs(batch)])(program)
            artifact = go.compile(program, target=setting.isa, threads=setting.threads)
            session = artifact.session(threads=setting.threads)
            for size in (batch,) if bounds is None else bounds:
                arrays = tuple(tensor.numpy() for tensor in network.inputs(size))
                name = f"{'batch ' if bounds is None else 'range, '}{size}"
                calls[f"{OURS[precision]} {name}"] = lambda s=session, a=arrays: s(*a)
    timings = {name: vars(timing) for name, timing in time_interleaved(calls, seconds).items()}
    versions = {"graphopt": go.__version__}
    return {"timings": timings, "failures": {}, "versions": versions, "machine": machine_name()}


def ratio(timings: Mapping[str, Mapping[str, float]], precision: str) -> float | None:
    """The better peer's median over ours; None where no peer of the precision ran."""
    rivals = [timings[name]["median"] for name in RIVALS[precision] if name in timings]
    return min(rivals) / timings[OURS[precision]]["median"] if rivals else None


def row(setting: Setting, precision: str, timings: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table's line: milliseconds an image of each runtime, our ratio, the goal, and whether it is reached."""
    names = (*TORCH, *RIVALS[precision], OURS[precision])
    cells = [
        f"{1e3 * timings[name]['median'] / setting.batch:.2f}" if name in timings else ""
        for name in names
    ]
    reached, goal = ratio(timings, precision), setting.goal(precision)
    met = "" if goal is None or reached is None else "yes" if reached >= goal else "no"
    figures = ["" if value is None else f"{value:.2f}" for value in (reached, goal)]
    return [NETWORKS[setting.model].title, *cells, *figures, met]


def tables(settings: list[Setting], results: Mapping[str, Any]) -> list[str]:
    """A Markdown table for each number of threads and precision."""
    lines: list[str] = []
    for threads in dict.fromkeys(setting.threads for setting in settings):
        chosen = [s for s in settings if s.threads == threads and s.key in results]
        for precision in OURS:
            rows = [row(s, precision, results[s.key]["timings"]) for s in chosen]
            titles = ["model", *TORCH, *RIVALS[precision], OURS[precision], "ratio", "goal", "met"]
            kept = [i for i, _ in enumerate(titles) if i < 1 or any(cells[i] for cells in rows)]
            lines += ["", f"{precision}, {threads} thread{'s'[: threads - 1]}, ms an image:", ""]
            lines += markdown.table(
                [titles[i] for i in kept], [[cells[i] for i in kept] for cells in rows]
            )
    return lines


def dynamic_table(settings: list[Setting], results: Mapping[str, Any]) -> list[str]:
    """Milliseconds an image of each batch, and the time of batch 1 over it: 1 and above is no worse."""
    rows = []
    for setting in settings:
        timings = results[f"{setting.key} dynamic"]["timings"]
        for precision, label in OURS.items():
            images = [1e3 * timings[f"{label} {n}"]["median"] / int(n[-1]) for n in DYNAMIC]
            ratios = [f"{image:.2f} ({images[0] / image:.2f})" for image in images[1:]]
            title = NETWORKS[setting.model].title
            rows.append([title, precision, str(setting.threads), f"{images[0]:.2f}", *ratios])
    return ["", *markdown.table(["model", "precision", "threads", *DYNAMIC], rows)]


def header(results: list[Mapping[str, Any]], isa: str) -> list[str]:
    """How it was measured: the command, the machine, the versions."""
    versions = {name: v for result in results for name, v in result["versions"].items()}
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    lines = [
        "",
        markdown.command_line("benchmarks/peers.py"),
        "",
        f"{markdown.machine_line(results[0]['machine'])}; {named}.",
    ]
    return lines if isa == "native" else [*lines, _UNLIMITED]


def panels(settings: list[Setting], results: Mapping[str, Any]) -> dict[str, Any]:
    """What the bar chart shows: latencies by table, model and runtime; eager PyTorch is left to the tables."""
    drawn: dict[str, dict[str, dict[str, float]]] = {}
    for setting in settings:
        timings = results[setting.key]["timings"]
        for precision, label in OURS.items():
            title = f"{precision}, threads: {setting.threads}"
            known = [name for name in RIVALS[precision] if name in timings]
            latencies = {name: timings[name]["median"] for name in known}
            latencies["graphopt"] = timings[label]["median"]
            drawn.setdefault(title, {})[NETWORKS[setting.model].title] = latencies
    return drawn


def _limit_peers(isa: str) -> None:
    """Start this command anew with the environment that limits the peers, which read it when they are loaded."""
    limits = _LIMITS.get(isa, {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **limits})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=",".join(GOALS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--threads", default="1", help="one or more counts: 1,2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--isa", choices=("native", *TARGETS), default="native")
    parser.add_argument("--dynamic", action="store_true", help="our batches, without peers")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each rival")
    default = ",".join(PEERS)
    parser.add_argument("--peers", default=default, help=f"of {default}")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    return parser


def _settings(options: argparse.Namespace) -> list[Setting]:
    counts = [int(count) for count in options.threads.split(",")]
    models = options.models.split(",")
    for model in models:
        if model not in NETWORKS:
            raise BenchmarkError(f"unknown model {model!r}; known are {', '.join(NETWORKS)}")
    if max(counts) > available_cpus():
        raise BenchmarkError(
            f"option threads: {max(counts)} threads need as many CPUs; this process may use {available_cpus()}"
        )
    return [Setting(model, n, options.batch, options.isa) for n in counts for model in models]


def main() -> None:
    options = _parser().parse_args()
    _limit_peers(options.isa)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    settings, peers = _settings(options), tuple(options.peers.split(","))
    check_peers(peers, calibrated=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "peers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    keys = [f"{s.key} dynamic" if options.dynamic else s.key for s in settings]
    for setting, key in zip(settings, keys, strict=True):
        wanted = [] if options.dynamic else peers_of(setting.model, peers)
        if is_finished(results.get(key), wanted) and not options.fresh:
            continue
        log.info("measuring %s", key)
        if options.dynamic:
            results[key] = measure_dynamic(setting, options.seconds)
        else:
            results[key] = measure(setting, options.seconds, wanted)
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=1).encode())
    lines = header([results[key] for key in keys], options.isa)
    if options.dynamic:
        lines += dynamic_table(settings, results)
    else:
        lines += tables(settings, results)
    section = "peers" if options.isa == "native" else f"peers {options.isa}"
    section += " dynamic" if options.dynamic else f" batch {options.batch}"
    if not options.dynamic:
        charts.bar_chart(
            options.output / f"{section.replace(' ', '-')}.svg", panels(settings, results)
        )
    if options.document is not None:
        markdown.replace_section(options.document, section, [*lines, ""])
    print("\n".join(lines).strip())


if __name__ == "__main__":
    main()
