"""The inner loops of the ARM kernels, read from their assembly: an emulator has no clock.

    python benchmarks/arm.py [--rows raspberry-pi-5,raspberry-pi-4] [--document docs/targets.md]

For every family of kernels and row: products a load, vectors that are stored to the stack and loaded again (spills), the
instructions of one turn of the loop, and what ``llvm-mca`` (Debian: ``llvm-22``, ``llvm``) says that a turn takes on the row's
processor in ``PROCESSORS``. A pixel that a tile has one too few of for its pairs counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tvm

from graphopt.backends.arm.isa import ISAS
from graphopt.backends.cpu.conv import conv2d
from graphopt.backends.cpu.conv_plan import plan_conv2d
from graphopt.backends.cpu.depthwise import depthwise
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.sparse import sparse
from graphopt.backends.cpu.sparse_forms import as_planar
from graphopt.backends.cpu.winograd import winograd
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout, QuantizedAdd, Requantize
from graphopt.bench import markdown
from graphopt.errors import BenchmarkError
from graphopt.files import atomic_write

# The processor whose model times a row. LLVM has none of the Cortex-A76, and its server twin is the Neoverse N1.
PROCESSORS = {
    "neon": "cortex-a72",
    "neon-dotprod": "neoverse-n1",
    "neon-i8mm": "neoverse-n2",
    "raspberry-pi-4": "cortex-a72",
    "raspberry-pi-5": "neoverse-n1",
    "graviton2": "neoverse-n1",
    "graviton3": "neoverse-v1",
}
_ITERATIONS = 100
_MATTR = "+dotprod,+i8mm"
# Multiply-accumulates of an instruction on 128-bit vectors.
_MACS = {
    "sdot": 16,
    "udot": 16,
    "usdot": 16,
    "sudot": 16,
    "smull": 8,
    "smlsl": 8,
    "fmla": 4,
    "usmmla": 32,
}
_WIDENING = {"smull": 4, "smlal": 4, "smlsl": 4}  # of 16 bits
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"^\s+(?:b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\d+,)\s*(\.L\w+)$")
_VECTOR = re.compile(r"\b[bhsdqv]\d+\b")
_STACK = re.compile(r"\[sp\b")


def _layer(
    channels: tuple[int, int],
    side: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    dtype: str = "uint8",
    residual: bool = False,
) -> Conv2d:
    integer = dtype == "uint8"
    pad = kernel // 2
    out = (side + 2 * pad - kernel) // stride + 1
    add = QuantizedAdd(700_001, 300_007, 20, 3, 9, 101, 0, 255) if residual else None
    epilogue = Epilogue(Requantize(3, 0, 255), add) if integer else Epilogue()
    x = Layout(1, side, side, channels[0], dtype, pad, pad, pad, pad, -(-channels[0] // 4) * 4)
    y = Layout(1, out, out, channels[1], dtype)
    return Conv2d(
        x,
        y,
        (kernel, kernel),
        (stride, stride),
        (pad, pad),
        groups=groups,
        epilogue=epilogue,
        residual=y if residual else None,
    )


Make = Callable[[Conv2d, Isa], Any]


def _dense(workload: Conv2d, isa: Isa) -> Any:
    return conv2d(workload, isa, 1)


def _depthwise(workload: Conv2d, isa: Isa) -> Any:
    return depthwise(workload, isa, 1)


def _winograd(workload: Conv2d, isa: Isa) -> Any:
    return winograd(workload, isa, 1)


def _sparse(workload: Conv2d, isa: Isa) -> Any:
    return sparse(as_planar(workload), isa, 1)


# Layers of ResNet-50 and MobileNetV2.
KERNELS: dict[str, tuple[Make, Conv2d]] = {
    "int8 3x3, 56x56x64": (_dense, _layer((64, 64), 56, 3)),
    "int8 1x1, 28x28x128 to 512, residual": (_dense, _layer((128, 512), 28, 1, residual=True)),
    "int8 3x3, 7x7x512": (_dense, _layer((512, 512), 7, 3)),
    "int8 7x7 / 2, 224x224x3": (_dense, _layer((3, 64), 224, 7, 2)),
    "int8 grouped 3x3, 14x14x256 by 32": (_dense, _layer((256, 256), 14, 3, groups=32)),
    "int8 linear, 2048 to 1000": (_dense, _layer((2048, 1000), 1, 1)),
    "int8 depthwise 3x3, 56x56x144": (_depthwise, _layer((144, 144), 56, 3, groups=144)),
    "int8 depthwise 3x3 / 2, 56x56x144": (_depthwise, _layer((144, 144), 56, 3, 2, 144)),
    "int8 sparse 1x1, 28x28x128 to 512": (_sparse, _layer((128, 512), 28, 1)),
    "int8 Winograd 3x3, 56x56x64": (_winograd, _layer((64, 64), 56, 3)),
    "f32 3x3, 56x56x64": (_dense, _layer((64, 64), 56, 3, dtype="float32")),
    "f32 Winograd 3x3, 56x56x64": (_winograd, _layer((64, 64), 56, 3, dtype="float32")),
    "f32 depthwise 3x3, 56x56x144": (
        _depthwise,
        _layer((144, 144), 56, 3, groups=144, dtype="float32"),
    ),
}


@dataclass
class Loop:
    """One turn of an innermost loop. ``loads`` in registers of vectors, without ``spills``."""

    kernel: str
    row: str
    processor: str
    tile: str
    macs: float
    products: int
    loads: int
    spills: int
    instructions: int
    cycles: float
    mix: dict[str, int] = field(default_factory=dict)

    @property
    def products_a_load(self) -> float:
        return self.products / max(1, self.loads)


def instructions(assembly: str) -> list[str]:
    """Labels and instructions, without directives and comments."""
    lines = []
    for line in assembly.splitlines():
        text = line.split("//")[0].rstrip()
        if _LABEL.match(text) or (text.startswith("\t") and not text.startswith("\t.")):
            lines.append(text)
    return [line for line in lines if not line.startswith((".Ltmp", ".Lfunc"))]


def loops(lines: list[str]) -> Iterator[list[str]]:
    """The bodies of the innermost loops: from a label to the first branch back to it, no other branch between."""
    for end, line in enumerate(lines):
        branch = _BRANCH.match(line)
        if branch is None:
            continue
        start = next((i for i in range(end, -1, -1) if lines[i] == f"{branch[1]}:"), None)
        if start is None:
            continue
        body = [text for text in lines[start + 1 : end + 1] if not _LABEL.match(text)]
        if sum(_BRANCH.match(text) is not None for text in body) == 1:
            yield body


def _macs(line: str) -> int:
    name = line.split()[0].removesuffix("2")
    if name in _WIDENING and re.match(r"\s*\w+\s+v\d+\.4s", line):
        return _WIDENING[name]
    return _MACS.get(name, 0)


def _spilled(line: str) -> int:
    """Vectors that an instruction moves to or from the stack."""
    name, _, rest = line.strip().partition("\t")
    if not name.startswith(("ldr", "ldp", "ldur", "str", "stp", "stur")) or not _STACK.search(rest):
        return 0
    return len(_VECTOR.findall(rest.split("[")[0]))


def _loaded(line: str) -> int:
    name, _, rest = line.strip().partition("\t")
    if not name.startswith("ld") or _STACK.search(rest):
        return 0
    return len(_VECTOR.findall(rest.split("[")[0].split("}")[0]))


def cycles(body: list[str], processor: str) -> float:
    """Cycles of a turn, by llvm-mca."""
    found = next(
        (
            name
            for name in ("llvm-mca-22", "llvm-mca-19", "llvm-mca", "llvm-mca-14")
            if shutil.which(name)
        ),
        None,
    )
    if found is None:
        raise BenchmarkError("llvm-mca is not installed; apt-get install llvm-22 or llvm")
    code = "\n".join(line for line in body if not _BRANCH.match(line))
    command = [found, "-mtriple=aarch64", f"-mcpu={processor}", f"-mattr={_MATTR}"]
    command += [f"-iterations={_ITERATIONS}", "-instruction-info=0", "-resource-pressure=0"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total is not None, done.stderr
    return int(total[1]) / _ITERATIONS


def examine(label: str, isa: Isa, processor: str = "") -> Loop:
    """The loop of a kernel that multiplies most; without a processor it is not timed."""
    make, workload = KERNELS[label]
    module = tvm.compile(make(workload, isa), target=isa.target())
    bodies = list(loops(instructions(module.mod.inspect_source("s"))))
    body = max(bodies, key=lambda lines: sum(map(_macs, lines)))
    tile, useful = "", 1.0
    if make is _dense:
        plan = plan_conv2d(workload, isa)
        tile = f"{plan.pixels} x {plan.vectors}"
        both = plan.isa.sum_pixels
        useful = plan.pixels / (-(-plan.pixels // both) * both)
    names = Counter(line.split()[0] for line in body)
    return Loop(
        kernel=label,
        row=isa.name,
        processor=processor,
        tile=tile,
        macs=useful * sum(map(_macs, body)),
        products=sum(_macs(line) > 0 for line in body),
        loads=sum(map(_loaded, body)),
        spills=sum(map(_spilled, body)),
        instructions=len(body),
        cycles=cycles(body, processor) if processor else 0.0,
        mix=dict(names.most_common()),
    )


def table(found: list[Loop]) -> list[str]:
    """A row a kernel and row of instructions."""
    titles = ["kernel", "row", "timed as", "tile", "products", "a load", "spills", "instructions"]
    titles += ["cycles", "MACs a cycle"]
    cells = [
        [
            *(loop.kernel, loop.row, loop.processor, loop.tile, str(loop.products)),
            *(f"{loop.products_a_load:.1f}", str(loop.spills), str(loop.instructions)),
            *(f"{loop.cycles:.1f}", f"{loop.macs / loop.cycles:.1f}"),
        ]
        for loop in found
    ]
    return markdown.table(titles, cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(PROCESSORS), help=f"of {', '.join(PROCESSORS)}")
    parser.add_argument("--kernels", default="", help="only those whose names hold this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument("--document", type=Path, help="a Markdown file whose section to renew")
    return parser


def main() -> None:
    options = _parser().parse_args()
    labels = [label for label in KERNELS if options.kernels in label]
    rows = options.rows.split(",")
    found = [examine(label, ISAS[row], PROCESSORS[row]) for row in rows for label in labels]
    body = {"kernels": [asdict(loop) for loop in found]}
    options.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output / "arm.json") as file:
        file.write(json.dumps(body, indent=1).encode())
    lines = table(found)
    if options.document is not None:
        markdown.replace_section(options.document, "ARM inner loops", lines)
    print(json.dumps(body) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
