"""Where sparse kernels break even: layers of ResNet-50 x shares of zeros x patterns, against the dense kernel in turns.

``python benchmarks/sparse.py --dtype int8 --zeros 0.5,0.7,0.8,0.9,0.95``: a table, ``sparse.json`` and the picture
``sparse.svg``. Both kernels are those that the compiler would take (dense: direct or Winograd), one thread, warm caches,
fastest of many calls in one interleaved run; a cell is the dense kernel's time over the sparse one's, measured and, in
brackets, as the cost model expects it. Above 1 the sparse kernel is faster. Every row is written when it is measured, and a
second run measures what is missing; ``--fresh`` begins again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from graphopt.backends.cpu.conv import conv2d, pack_conv2d
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.rivals import is_winograd
from graphopt.backends.cpu.sparse import sparse
from graphopt.backends.cpu.sparse_forms import as_planar, compare, rounds_in_range
from graphopt.backends.cpu.sparse_pack import pack_sparse
from graphopt.backends.cpu.sparse_plan import plan_sparse
from graphopt.backends.cpu.winograd import winograd
from graphopt.backends.cpu.winograd_plan import plan_winograd
from graphopt.backends.cpu.winograd_weights import pack_winograd
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout, QuantizedAdd, Requantize
from graphopt.backends.isas import ISAS
from graphopt.backends.targets import resolve
from graphopt.bench import markdown
from graphopt.bench.report import machine_name
from graphopt.bench.timing import time_interleaved
from graphopt.files import atomic_write

Array = np.ndarray[Any, Any]
# name: channels in and out, size of the input map, kernel, stride, with a residual
LAYERS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "1x1 64-64 @56": (64, 64, 56, 1, 1, False),
    "1x1 256-64 @56": (256, 64, 56, 1, 1, False),
    "1x1 64-256 @56": (64, 256, 56, 1, 1, False),
    "1x1 64-256 @56 +": (64, 256, 56, 1, 1, True),
    "1x1 256-128 @56": (256, 128, 56, 1, 1, False),
    "1x1 512-128 @28": (512, 128, 28, 1, 1, False),
    "1x1 128-512 @28 +": (128, 512, 28, 1, 1, True),
    "1x1/2 256-512 @56": (256, 512, 56, 1, 2, False),
    "1x1 512-256 @28": (512, 256, 28, 1, 1, False),
    "1x1 1024-256 @14": (1024, 256, 14, 1, 1, False),
    "1x1 256-1024 @14 +": (256, 1024, 14, 1, 1, True),
    "1x1/2 512-1024 @28": (512, 1024, 28, 1, 2, False),
    "1x1 1024-512 @14": (1024, 512, 14, 1, 1, False),
    "1x1 2048-512 @7": (2048, 512, 7, 1, 1, False),
    "1x1 512-2048 @7 +": (512, 2048, 7, 1, 1, True),
    "1x1/2 1024-2048 @14": (1024, 2048, 14, 1, 2, False),
    "3x3 64-64 @56": (64, 64, 56, 3, 1, False),
    "3x3 128-128 @28": (128, 128, 28, 3, 1, False),
    "3x3 256-256 @14": (256, 256, 14, 3, 1, False),
    "3x3 512-512 @7": (512, 512, 7, 3, 1, False),
    "3x3/2 128-128 @56": (128, 128, 56, 3, 2, False),
    "3x3/2 256-256 @28": (256, 256, 28, 3, 2, False),
    "3x3/2 512-512 @14": (512, 512, 14, 3, 2, False),
}
PATTERNS = {"block": 4, "element": 1}  # neighbouring input channels that are zero together
_ADD = QuantizedAdd(700_001, 511_111, 20, 0, 7, 0, 0, 255)


@dataclass(frozen=True)
class Row:
    """One layer at one share of zeros: seconds of both kernels, and the cost model's ratio of them.

    ``dense`` is the kernel that the compiler would take, of the kind ``kind``; ``direct`` the direct one, with all products.
    """

    layer: str
    dtype: str
    pattern: str
    zeros: float
    density: float
    dense: float
    direct: float
    sparse: float
    predicted: float | None
    kind: str

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.layer, self.dtype, self.pattern, self.zeros

    @property
    def gain(self) -> float:
        """The dense kernel's time over the sparse one's."""
        return self.dense / self.sparse


def workload_of(layer: str, dtype: str) -> Conv2d:
    """The layer as the network has it, between tensors without pad channels."""
    inputs, outputs, size, kernel, stride, residual = LAYERS[layer]
    element, margin, out = ("uint8" if dtype == "int8" else dtype), kernel // 2, size // stride
    x = Layout(1, size, size, inputs, element, margin, margin, margin, margin)
    y = Layout(1, out, out, outputs, element)
    epilogue = Epilogue(float_residual=residual)
    if dtype == "int8":
        requantize = Requantize(0, 0, 255)
        epilogue = Epilogue(requantize, residual_add=_ADD if residual else None)
    return Conv2d(
        x,
        y,
        (kernel, kernel),
        (stride, stride),
        (margin, margin),
        epilogue=epilogue,
        residual=y if residual else None,
    )


def weight_of(workload: Conv2d, dtype: str, pattern: str, zeros: float) -> Array:
    """Random weights, a share of whose blocks is zero, wherever."""
    generator = np.random.default_rng(0)
    shape = workload.y.channels, workload.x.channels, *workload.kernel
    weight = generator.integers(1, 64, shape) * generator.choice((-1, 1), shape)
    group = PATTERNS[pattern]
    kept = generator.random((shape[0], shape[1] // group, *shape[2:])) >= zeros
    masked = weight * np.repeat(kept, group, axis=1)
    return np.asarray(masked, np.int8 if dtype == "int8" else np.float32)


def _tensor(layout: Layout) -> Array:
    shape = (layout.batch or 1, *layout.shape)
    return np.random.default_rng(1).integers(0, 128, shape).astype(layout.dtype)


def _compiled(function: Any, isa: Isa) -> Any:
    return tvm.compile(function, target=isa.target())[str(function.attrs["global_symbol"])]


@functools.cache
def _sparse_kernel(workload: Conv2d, isa: Isa) -> Any:
    """One for all shares of zeros."""
    return _compiled(sparse(workload, isa, 1), isa)


def _call(kernel: Any, workload: Conv2d, constants: list[Array]) -> Callable[[], object]:
    layouts = [layout for layout in (workload.residual, workload.y) if layout is not None]
    arrays = [_tensor(workload.x), *constants, *map(_tensor, layouts)]
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
    return lambda: kernel(*arguments)


def dense_calls(
    workload: Conv2d, weight: Array, multiplier: Array | None, isa: Isa
) -> dict[str, Callable[[], object]]:
    """The direct kernel, and Winograd's where the compiler would take that."""
    packed = pack_conv2d(workload, isa, weight, None, multiplier)
    calls = {"direct": _call(_compiled(conv2d(workload, isa, 1), isa), workload, list(packed))}
    if is_winograd(workload, isa, 1, sums_fit=True):
        stored = pack_winograd(workload, isa, 1, weight, None, multiplier)
        size = plan_winograd(workload, isa, 1).packed_weights
        points = np.ones(size, np.float32 if multiplier is None else np.int32)
        kernel = _compiled(winograd(workload, isa, 1), isa)
        calls["winograd"] = _call(kernel, workload, [points, *stored[1:]])
    return calls


def sparse_call(
    workload: Conv2d, weight: Array, multiplier: Array | None, isa: Isa
) -> Callable[[], object]:
    wanted = as_planar(workload)
    if multiplier is not None:
        wanted = rounds_in_range(wanted, weight, None, multiplier)
    packed = pack_sparse(plan_sparse(wanted, isa), weight, None, multiplier, isa.flips)
    return _call(_sparse_kernel(wanted, isa), wanted, list(packed))


def measure(
    layer: str, dtype: str, cases: list[tuple[str, float]], isa: Isa, seconds: float
) -> Iterator[Row]:
    """The rows of one layer: dense and all sparse cases in turns."""
    workload = workload_of(layer, dtype)
    multiplier = None if dtype != "int8" else np.full(workload.y.channels, 1e-4, np.float32)
    weights = {case: weight_of(workload, dtype, *case) for case in cases}
    calls = dense_calls(workload, next(iter(weights.values())), multiplier, isa)
    kind = list(calls)[-1]
    for case, weight in weights.items():
        calls[repr(case)] = sparse_call(workload, weight, multiplier, isa)
    timings = time_interleaved(calls, seconds=seconds)
    for case, weight in weights.items():
        forms = compare(workload, weight, isa, 1)
        density, predicted = (1.0, None) if forms is None else (forms.density, forms.gain)
        best, direct, ours = (timings[name].fastest for name in (kind, "direct", repr(case)))
        yield Row(layer, dtype, *case, density, best, direct, ours, predicted, kind)


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(rows: list[Row]) -> list[str]:
    """A line a layer and pattern, a column a share of zeros, a line of geometric means at the end."""
    shares = sorted({row.zeros for row in rows})
    lines = []
    groups = dict.fromkeys((row.layer, row.dtype, row.pattern) for row in rows)
    for group in groups:
        found = {row.zeros: row for row in rows if row.key[:3] == group}
        first = next(iter(found.values()))
        cells = [_cell(found.get(share)) for share in shares]
        lines.append([*group, first.kind, f"{1e6 * first.dense:.0f}", *cells])
    for dtype, pattern in dict.fromkeys((row.dtype, row.pattern) for row in rows):
        kept = [row for row in rows if (row.dtype, row.pattern) == (dtype, pattern)]
        lines.append(["geometric mean", dtype, pattern, "", "", *_means(kept, shares, "dense")])
        if any(row.kind != "direct" for row in kept):
            cells = _means(kept, shares, "direct")
            lines.append(["against direct kernels", dtype, pattern, "", "", *cells])
    titles = ["layer", "type", "pattern", "dense kernel", "us", *(f"{s:.0%}" for s in shares)]
    return markdown.table(titles, lines)


def _means(rows: list[Row], shares: list[float], rival: str) -> list[str]:
    """The geometric mean over the layers of a dense time over the sparse one's, at each share of zeros."""
    cells = []
    for share in shares:
        gains = [getattr(row, rival) / row.sparse for row in rows if row.zeros == share]
        cells.append(f"{_mean(gains):.2f}" if gains else "")
    return cells


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    predicted = "-" if row.predicted is None else f"{row.predicted:.2f}"
    return f"{row.gain:.2f} ({predicted})"


def picture(path: Path, rows: list[Row]) -> None:
    """The map: layers down, zeros across, a panel an element type and pattern; white is break-even."""
    import matplotlib as mpl
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.dtype, row.pattern) for row in rows))
    figure = Figure(figsize=(6.5 * len(panels), 9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        kept = [row for row in rows if (row.dtype, row.pattern) == panel]
        names = list(dict.fromkeys(row.layer for row in kept))
        shares = sorted({row.zeros for row in kept})
        cells = np.full((len(names), len(shares)), np.nan)
        for row in kept:
            place = names.index(row.layer), shares.index(row.zeros)
            cells[place] = math.log2(row.gain)
            axis.text(place[1], place[0], f"{row.gain:.2f}", ha="center", va="center", fontsize=8)
        axis.imshow(cells, cmap="RdYlGn", norm=TwoSlopeNorm(0, -3, 3), aspect="auto")
        axis.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("zero blocks" if panel[1] == "block" else "zeros")
        axis.set_title(f"{panel[0]}, {panel[1]}: dense time / sparse time", loc="left")
    with mpl.rc_context({"svg.hashsalt": "graphopt"}):
        figure.savefig(path)


def _read(path: Path, isa: Isa) -> list[Row]:
    """The rows of an earlier run on the same machine and instruction set, in this form."""
    if not path.exists():
        return []
    body = json.loads(path.read_text())
    if (body["machine"], body["isa"]) != (machine_name(), isa.name):
        return []
    if any(row.keys() != Row.__annotations__.keys() for row in body["rows"]):
        return []
    return [Row(**row) for row in body["rows"]]


def _write(path: Path, isa: Isa, rows: list[Row]) -> None:
    shown = [{**asdict(row)} for row in rows]
    with atomic_write(path) as file:
        body = {"machine": machine_name(), "isa": isa.name, "rows": shown}
        file.write(json.dumps(body, indent=1).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", choices=("native", *ISAS), default="native")
    parser.add_argument("--dtype", default="int8,float32")
    parser.add_argument("--pattern", default="block", help=f"of {', '.join(PATTERNS)}")
    parser.add_argument("--zeros", default="0.5,0.6,0.7,0.8,0.9,0.95")
    parser.add_argument("--layers", default="", help="a part of their names; all without it")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of each kernel")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    return parser


def main() -> None:
    options = _parser().parse_args()
    isa = ISAS[resolve("native").isa if options.isa == "native" else options.isa]
    options.output.mkdir(parents=True, exist_ok=True)
    name = "sparse" if options.isa == "native" else f"sparse {isa.name}"
    path = options.output / f"{name.replace(' ', '-')}.json"
    rows = [] if options.fresh else _read(path, isa)
    cases = [(p, float(z)) for p in options.pattern.split(",") for z in options.zeros.split(",")]
    for dtype in options.dtype.split(","):
        for layer in (name for name in LAYERS if options.layers in name):
            known = {row.key for row in rows}
            missing = [case for case in cases if (layer, dtype, *case) not in known]
            if missing:
                rows += measure(layer, dtype, missing, isa, options.seconds)
                _write(path, isa, rows)
    dtypes = options.dtype.split(",")
    rows = [
        row
        for row in rows
        if row.dtype in dtypes and options.layers in row.layer and (row.pattern, row.zeros) in cases
    ]
    section = name if "int8" in dtypes else f"{name} {options.dtype}"
    picture(options.output / f"{section.replace(' ', '-')}.svg", rows)
    lines = table(rows)
    if options.document is not None:
        head = ["", markdown.command_line("benchmarks/sparse.py"), ""]
        machine = [f"{markdown.machine_line(machine_name())}; {isa.name}.", ""]
        markdown.replace_section(options.document, section, [*head, *machine, *lines, ""])
    shown = [dataclasses.asdict(row) for row in rows]
    print(json.dumps(shown) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
