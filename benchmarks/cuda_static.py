"""What the machine code of matrix-product kernels says without a GPU: registers, spills, the main loop, what bounds it.

``python benchmarks/cuda_static.py --arch sm_80,sm_90 --products u8,f16,u8-2of4``: a table and ``cuda_static.json``; needs ``nvcc`` and
``nvdisasm`` (package ``nvidia-cuda-nvdisasm``). A 3 x 3 convolution of 256 channels with padding is compiled for every tile. Cycles
are of one step (64 bytes of k) of one block, as in ``conv_plan.bounds``; "issue" are the loop's instructions in the four
schedulers of a multiprocessor. The share of the peak is what the largest of them leaves to the products: nothing else in a
kernel's time is counted.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import tvm
from tvm import relax

from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout, Requantize
from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.build import build_library
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_plan import (
    STEP,
    ConvPlan,
    Tile,
    bounds,
    plan_conv,
    possible,
    tiles_of,
)
from graphopt.backends.cuda.fragments import MMA_COLUMNS, MMA_ROWS
from graphopt.backends.cuda.products import FRAGMENT_BYTES, PRODUCTS
from graphopt.backends.cuda.sparse_conv import sparse_conv
from graphopt.backends.cuda.sparse_fragments import SHAPES as SPARSE_SHAPES
from graphopt.backends.cuda.sparse_plan import TILES as SPARSE_TILES
from graphopt.backends.cuda.sparse_plan import SparseTile
from graphopt.bench import markdown
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write

PRUNED = "-2of4"  # behind the name of a product whose weights are pruned 2:4
_SCHEDULERS = 4
_CHANNELS, _SIZE, _BATCH = 256, 56, 32
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_PRODUCT = re.compile(r"[IHQ]MMA\b")


@dataclass(frozen=True)
class Loop:
    """The machine code of one kernel: registers of a thread, accesses to local memory (spills), its main loop."""

    registers: int
    spills: int
    instructions: int
    products: int


@dataclass(frozen=True)
class Row:
    """A kernel and the cycles of one step of a block."""

    arch: str
    product: str
    tile: str
    warps: int
    blocks: int  # that a multiprocessor holds
    loop: Loop
    cycles: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def share(self) -> float:
        return self.cycles["tensor"] / self.cycles[self.bound]


def disassembler() -> str | None:
    """``nvdisasm`` of the path, or of the package nvidia-cuda-nvdisasm."""
    spec = find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec is not None else ()
    packaged = (shutil.which("nvdisasm", path=f"{root}/cu13/bin") for root in roots)
    return shutil.which("nvdisasm") or next(filter(None, packaged), None)


def disassemble(cubin: bytes) -> str:
    """The text of a cubin. Raises BenchmarkError where there is no ``nvdisasm``."""
    program = disassembler()
    if program is None:
        raise BenchmarkError("nvdisasm was not found; pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, list[str]]:
    """The lines of every kernel, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section is not None:
            lines = found.setdefault(section[1].removesuffix("_kernel"), [])
        lines.append(line)
    return found


def examine(lines: Sequence[str]) -> Loop:
    """The loop that has most products; of straight code, all of it."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in lines:
        label, instruction = _LABEL.match(line), _INSTRUCTION.search(line)
        if label is not None:
            labels[label[1]] = len(code)
        if instruction is not None:
            code.append((instruction[1], line))

    def products(first: int, last: int) -> int:
        return sum(bool(_PRODUCT.match(name)) for name, _ in code[first : last + 1])

    spans = [(0, len(code) - 1)]
    for last, (name, line) in enumerate(code):
        target = re.search(r"`\((\.L_x_\d+)\)", line) if name.startswith("BRA") else None
        if target is not None and labels.get(target[1], last + 1) <= last:
            spans.append((labels[target[1]], last))
    # the innermost of those that multiply: the shortest
    loops = [span for span in spans[1:] if products(*span)] or spans[:1]
    first, last = min(loops, key=lambda span: span[1] - span[0])
    numbers = [int(number) for _, line in code for number in re.findall(r"\bR(\d+)\b", line)]
    return Loop(
        max(numbers, default=-1) + 1,
        sum(name.split(".")[0] in ("LDL", "STL") for name, _ in code),
        last - first + 1,
        products(first, last),
    )


def _workload(product: str) -> Conv2d:
    dtype = PRODUCTS[product].x
    layout = Layout(_BATCH, _SIZE, _SIZE, _CHANNELS, dtype)
    rounding = Requantize(3, 0, 255) if PRODUCTS[product].is_integer else None
    epilogue = Epilogue(requantize=rounding)
    point = 11 if PRODUCTS[product].is_integer else 0
    return Conv2d(layout, layout, (3, 3), padding=(1, 1), epilogue=epilogue, x_zero_point=point)


def _nothing() -> tvm.IRModule:
    """A Relax module that returns what it is given."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    return builder.get()


def machine_code(plans: Sequence[ConvPlan], arch: Arch) -> list[Loop]:
    """Compile the kernels together, as a model's are. Raises BenchmarkError without ``nvcc``."""
    kernels = [
        (sparse_conv if isinstance(plan.tile, SparseTile) else conv)(plan, arch) for plan in plans
    ]
    names = [str(kernel.attrs["global_symbol"]) for kernel in kernels]
    library = build_library(
        _nothing(), dict(zip(names, kernels, strict=True)), arch, "x86_64-unknown-linux-gnu"
    )
    if library.code != "cubin":
        raise BenchmarkError("nvcc was not found; pip install 'graphopt[cuda]'")
    image = re.search(rb"// cubin in base64\n([\w+/=]+)", library.data)
    assert image is not None
    code = functions(disassemble(base64.b64decode(image[1])))
    return [examine(code[name]) for name in names]


def label(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}"


def _plans(arch: Arch, product: str, tiles: Sequence[str]) -> list[ConvPlan]:
    """A plan for each tile of those named that fits the chip; none where it has no such product."""
    name = product.removesuffix(PRUNED)
    sparse = name != product
    if name not in arch.products or (sparse and not (arch.sparse and name in SPARSE_SHAPES)):
        return []
    every = SPARSE_TILES if sparse else tiles_of(arch)
    wanted = [
        one for one in every if possible(one, arch, 16) and (not tiles or label(one) in tiles)
    ]
    return [plan_conv(_workload(name), arch, one, PRODUCTS[name]) for one in wanted]


def measure(arch: Arch, products: Sequence[str], tiles: Sequence[str]) -> list[Row]:
    """A row for each product that the chip has and each tile, of those named, that fits it."""
    plans = [plan for name in products for plan in _plans(arch, name, tiles)]
    if not plans:
        return []
    rows = []
    for plan, loop in zip(plans, machine_code(plans, arch), strict=True):
        tile = plan.tile
        warps = tile.threads // 32
        # a loop of few instructions is unrolled: it has the products of several steps
        fragments = tile.warp_rows // MMA_ROWS * tile.warp_columns // MMA_COLUMNS
        of_a_step = arch.products[plan.product.name].count("mma.sync") * STEP // FRAGMENT_BYTES
        name = plan.product.name
        if isinstance(tile, SparseTile):
            name, of_a_step = name + PRUNED, 1
        steps = loop.products / (fragments * of_a_step)
        cycles = bounds(tile, arch)
        cycles["issue"] = loop.instructions * warps / _SCHEDULERS / steps
        about = (arch.name, name, label(tile), warps, tile.held(arch))
        rows.append(Row(*about, loop, cycles))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    titles = ("tile", "chip", "product", "warps", "blocks", "registers", "spills")
    more = ("other instructions a product", "tensor", "shared", "loads", "issue", "of the peak")
    cells = []
    for row in rows:
        loop = row.loop
        others = (loop.instructions - loop.products) / loop.products
        times = [f"{row.cycles[name]:.0f}" for name in ("tensor", "shared", "loads", "issue")]
        first = (row.tile, row.arch, row.product, str(row.warps), str(row.blocks))
        counts = (str(loop.registers), str(loop.spills), f"{others:.2f}")
        cells.append((*first, *counts, *times, f"{row.share:.0%}"))
    return markdown.table((*titles, *more), cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="sm_80,sm_90", help="chips, with commas")
    parser.add_argument("--products", default="u8,f16,tf32", help="u8, s8, f16, tf32, u8-2of4 ...")
    parser.add_argument("--tiles", default="", help="rows x columns, as 256x128, with commas; all")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="renew the table of this page")
    parser.add_argument("--section", default="machine code", help="of that page")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main() -> None:
    options = _parser().parse_args()
    tiles = [name for name in options.tiles.split(",") if name]
    rows: list[Row] = []
    for name in options.arch.split(","):
        rows += measure(ARCHS[name], options.products.split(","), tiles)
    body = {"rows": [{**asdict(row), "bound": row.bound, "share": row.share} for row in rows]}
    options.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output / "cuda_static.json") as file:
        file.write(json.dumps(body, indent=1).encode())
    lines = table(rows)
    if options.document is not None:
        head = ["", markdown.command_line("benchmarks/cuda_static.py"), ""]
        markdown.replace_section(options.document, options.section, [*head, *lines, ""])
    print(json.dumps(body) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
