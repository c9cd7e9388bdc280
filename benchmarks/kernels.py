"""Every distinct convolution and linear layer of the networks, timed alone, against the measured peak.

``python benchmarks/kernels.py --dtype int8 --network resnet50,minilm_l6 --output bench-out``: a table, ``kernels.json``
and the picture ``roofline.svg``. Layers are those that the compiler lowers, with the kernels it chooses; two of equal
shape and kind count once. One thread, best of many calls on warm caches, as a share of the peak of the same run: what
the kernel reaches, not what a network feels. Operations are those of direct convolution (a multiply-accumulate is two),
so that a Winograd kernel can exceed the peak; bytes are its arguments, each moved once.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

import graphopt as go
from graphopt.backends.cpu.bandwidth import measure_bandwidths
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.peak import measure_peak
from graphopt.backends.isas import ISAS
from graphopt.backends.lower.emit import Lowered, emit
from graphopt.backends.lower.one_tensor import ONE_TENSOR
from graphopt.backends.lower.plan import make_plan
from graphopt.backends.lower.step import Context
from graphopt.backends.targets import resolve
from graphopt.bench import Timing, charts, markdown, time_call
from graphopt.bench.networks import NETWORKS
from graphopt.bench.report import machine_name
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write
from graphopt.preparation import prepare

DTYPES = {"int8": "uint8", "float32": "float32"}  # the names of the peaks
_LARGE = 50_000_000  # multiply-accumulates from which a convolution has a goal
_GOAL, _FLOOR = 0.85, 0.65  # of the peak: the geometric mean, and the lowest
_COUNTED = ("conv2d", "linear")
Array = np.ndarray[Any, Any]

log = logging.getLogger("kernels")


@dataclass(frozen=True)
class Layer:
    """A kernel call of a lowered network: the function, its arguments' shapes, and its constants."""

    network: str
    name: str
    layer: str
    operator: str
    dtype: str
    macs: int
    function: Any
    constants: tuple[Array, ...]

    @property
    def buffers(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and element type of each argument, in order."""
        types = [parameter.ty for parameter in self.function.params]
        return [(tuple(int(size) for size in ty.shape), str(ty.dtype)) for ty in types]

    @property
    def stem(self) -> str:
        """The kernel's name without the hash of its epilogue's numbers."""
        return self.name.rpartition("_")[0]

    @property
    def kind(self) -> str:
        """The generator that made it ("conv2d", "depthwise" ...), or "linear"."""
        return "linear" if "linear" in self.operator else self.name.partition("_")[0]

    @property
    def bytes(self) -> int:
        """Bytes of all arguments: what has to move at least."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.buffers)


@dataclass(frozen=True)
class Row:
    """One layer's result; ``share`` is of the peak of its element type."""

    layer: Layer
    networks: tuple[str, ...]
    timing: Timing
    peak: float

    @property
    def gops(self) -> float:
        return 2e-9 * self.layer.macs / self.timing.fastest

    @property
    def share(self) -> float:
        return self.gops / self.peak

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return 2 * self.layer.macs / self.layer.bytes

    def to_json(self) -> dict[str, Any]:
        layer = self.layer
        named = {key: getattr(layer, key) for key in ("name", "layer", "kind", "dtype", "macs")}
        figures = {key: getattr(self, key) for key in ("gops", "share", "intensity")}
        timing = asdict(self.timing)
        return {**named, "networks": self.networks, "bytes": layer.bytes, **figures, **timing}


def lower(network: str, dtype: str, isa: Isa) -> Lowered:
    """The network as kernel calls for one thread, as ``go.compile`` makes them."""
    model, inputs = NETWORKS[network].model(), NETWORKS[network].inputs()
    program = go.capture(model, inputs)
    if dtype == "int8":
        program = go.passes.Quantize(calibration=[inputs])(program)
    prepared = prepare(program, isa, 1, lambda layers: {})
    return emit(make_plan(prepared), Context(prepared, isa, threads=1))


def layers(network: str, lowered: Lowered) -> Iterator[Layer]:
    """The calls that are convolutions or linear layers, in order of execution."""
    target = torch.ops.graphopt.call_kernel.default
    nodes = [
        node
        for node in lowered.module.graph.nodes
        if node.target == target and node.args[1] != ONE_TENSOR
    ]
    for node, call in zip(nodes, lowered.calls, strict=True):
        if not any(name in call.operator for name in _COUNTED) or not call.macs:
            continue
        constants = [
            lowered.module.get_parameter(str(tensor.target)).detach().numpy()
            for tensor in node.args[0]
            if tensor.op == "get_attr"
        ]
        function = lowered.functions[call.name]
        fields = call.name, call.layer, call.operator, call.dtype, call.macs
        yield Layer(network, *fields, function, tuple(constants))


def distinct(found: Iterable[Layer]) -> list[tuple[Layer, tuple[str, ...]]]:
    """The first layer of each shape, element type and kind, with the networks that have it."""
    groups: dict[Any, list[Layer]] = {}
    for layer in found:
        key = layer.stem, layer.kind, layer.dtype, tuple(layer.buffers)
        groups.setdefault(key, []).append(layer)
    return [
        (group[0], tuple(dict.fromkeys(layer.network for layer in group)))
        for group in groups.values()
    ]


def _arguments(layer: Layer) -> list[tvm.runtime.Tensor]:
    """Random activations around the layer's own constants: ``x, constants..., [residual], y``."""
    generator = np.random.default_rng(0)
    arrays = []
    for index, (shape, dtype) in enumerate(layer.buffers):
        if 1 <= index <= len(layer.constants):
            arrays.append(layer.constants[index - 1].reshape(shape))
        else:
            arrays.append(generator.integers(0, 128, shape).astype(dtype))
    return [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]


def build(layer: Layer, isa: Isa) -> Callable[[], object]:
    """One kernel compiled, as a call on its arguments."""
    kernel = tvm.compile(layer.function, target=isa.target())[layer.name]
    arguments = _arguments(layer)
    return lambda: kernel(*arguments)


def time_calls(
    calls: list[Callable[[], object]], isa: Isa, dtype: str, seconds: float
) -> tuple[float, list[Timing]]:
    """The peak, the best of one measurement before every 16th call, and the time of each call."""
    peak, timings = 0.0, []
    for index, call in enumerate(calls):
        if index % 16 == 0:
            log.info("timing %s: %d of %d", dtype, index, len(calls))
            peak = max(peak, measure_peak(isa, DTYPES[dtype]))
        timings.append(time_call(call, seconds=seconds))
    return peak, timings


def summary(rows: list[Row]) -> list[str]:
    """Per element type and kind: the geometric mean and the lowest share of the large convolutions."""
    lines = []
    for dtype, kind in dict.fromkeys((row.layer.dtype, row.layer.kind) for row in rows):
        large = [
            row
            for row in rows
            if (row.layer.dtype, row.layer.kind) == (dtype, kind) and row.layer.macs >= _LARGE
        ]
        if not large or kind == "linear":
            continue
        mean = math.exp(sum(math.log(row.share) for row in large) / len(large))
        lowest = min(large, key=lambda row: row.share)
        direct = "" if kind == "conv2d" else " (direct-equivalent)"
        lines.append(
            f"{dtype} {kind}{direct}, {len(large)} convolutions with at least 50 MMAC: geometric mean "
            f"{mean:.0%} of peak (goal {_GOAL:.0%}), lowest {lowest.share:.0%} (goal {_FLOOR:.0%}: "
            f"{lowest.layer.stem}, {lowest.layer.layer} of {lowest.networks[0]})"
        )
    return lines


def table(rows: list[Row]) -> list[str]:
    """A Markdown line a layer, in order of networks."""
    titles = ["kernel", "networks", "kind", "MMAC", "kB", "ops/B", "us", "GOPS", "of peak"]
    cells = [
        [
            row.layer.stem,
            ", ".join(row.networks),
            row.layer.kind,
            f"{row.layer.macs / 1e6:.1f}",
            f"{row.layer.bytes / 1e3:.0f}",
            f"{row.intensity:.0f}",
            f"{1e6 * row.timing.fastest:.1f}",
            f"{row.gops:.0f}",
            f"{row.share:.0%}",
        ]
        for row in rows
    ]
    return markdown.table(titles, cells)


def measure(dtype: str, networks: list[str], isa: Isa, seconds: float) -> tuple[float, list[Row]]:
    """The peak, and a row for each distinct layer of the networks; all are compiled before the first is timed."""
    found: list[Layer] = []
    for network in networks:
        log.info("lowering %s %s", network, dtype)
        found += layers(network, lower(network, dtype, isa))
    kept = [(layer, names) for layer, names in distinct(found) if layer.dtype == dtype]
    calls = [build(layer, isa) for layer, _ in kept]
    peak, timings = time_calls(calls, isa, dtype, seconds)
    return peak, [Row(*item, timing, peak) for item, timing in zip(kept, timings, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", choices=("native", *ISAS), default="native")
    parser.add_argument("--network", default=",".join(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of each layer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    return parser


def main() -> None:
    options = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    isa = ISAS[resolve("native").isa if options.isa == "native" else options.isa]
    networks = options.network.split(",")
    for network in networks:
        if network not in NETWORKS:
            raise BenchmarkError(f"unknown network {network!r}; known are {', '.join(NETWORKS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    bandwidths = measure_bandwidths(isa)
    dtypes = list(DTYPES) if options.dtype == "both" else [options.dtype]
    measured = {dtype: measure(dtype, networks, isa, options.seconds) for dtype in dtypes}
    peaks = {dtype: peak for dtype, (peak, _) in measured.items()}
    rows = [row for _, found in measured.values() for row in found]
    body = {
        "machine": machine_name(),
        "isa": isa.name,
        "peaks_gops": peaks,
        "bandwidths_gb_s": bandwidths,
        "kernels": [row.to_json() for row in rows],
        "summary": summary(rows),
    }
    with atomic_write(options.output / "kernels.json") as file:
        file.write(json.dumps(body, indent=1).encode())
    picture = [
        (
            charts.Roofs(f"{dtype}, {isa.name}", peak, bandwidths),
            [charts.Point(row.intensity, row.gops, row.layer.kind) for row in found],
        )
        for dtype, (peak, found) in measured.items()
    ]
    charts.roofline(options.output / "roofline.svg", picture)
    head, tail = _header(isa, peaks, bandwidths), [f"- {line}" for line in summary(rows)]
    if options.document is not None:
        section = "kernels" if isa.name == resolve("native").isa else f"kernels {isa.name}"
        folded = [line for dtype, (_, found) in measured.items() for line in _folded(dtype, found)]
        markdown.replace_section(options.document, section, [*head, *tail, "", *folded])
    shown = [line for _, found in measured.values() for line in (*table(found), "")]
    print(json.dumps(body) if options.json else "\n".join([*head, *shown, *tail]).strip())


def _folded(dtype: str, rows: list[Row]) -> list[str]:
    """A table that a page shows when it is asked to."""
    title = f"<summary>{len(rows)} kernels, {dtype}</summary>"
    return ["<details>", title, "", *table(rows), "", "</details>", ""]


def _header(isa: Isa, peaks: dict[str, float], bandwidths: dict[str, float]) -> list[str]:
    """How it was measured, and the roofs."""
    roofs = [f"{dtype} {peak:.0f} GOPS" for dtype, peak in peaks.items()]
    roofs += [f"{memory} {rate:.0f} GB/s" for memory, rate in bandwidths.items()]
    command = markdown.command_line("benchmarks/kernels.py")
    machine = markdown.machine_line(machine_name())
    return ["", command, "", f"{machine}; {isa.name}: {', '.join(roofs)}.", ""]


if __name__ == "__main__":
    main()
