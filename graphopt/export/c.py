"""``export_c``: a compiled model as a folder of C, which needs neither Python nor TVM.

The calls are those of the manifest's straight line, the kernels the object file that was linked into ``model.so``, under
names that begin with the model's: several exports fit into one program.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import graphopt
from graphopt import elf
from graphopt.errors import ExportError
from graphopt.export.cpu import cpu_values
from graphopt.export.folder import check_folder, write_folder
from graphopt.export.layout import Layout, Port, lay_out
from graphopt.export.tables import largest_shape, tables

if TYPE_CHECKING:
    from graphopt.artifact import Artifact

_FUNCTION = "__tvm_ffi_"
# What kernels call back, and the names of it in interface.c.
_CALLBACKS = {
    "__TVMBackendParallelLaunch": "launch",
    "__TVMBackendAllocWorkspace": "allocate",
    "__TVMBackendFreeWorkspace": "release",
    "TVMFFIErrorSetRaisedFromCStrParts": "raise_parts",
    "TVMFFIErrorSetRaisedFromCStr": "raise",
}
_OF_TVM = ("TVM", "__TVM", "tvm")
_PARTS = ("interface.c", "threads.c", "weights.c", "run.c")
# Headers that NAME.h would hide from the code, and NAME.c that would be the example.
_TAKEN = """
    assert complex cpuid ctype errno fenv float inttypes iso646 limits locale main math pthread sched setjmp signal
    stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar unistd
    wchar wctype
"""


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of each file, and of what ``create`` allocates."""

    folder: Path
    name: str
    files: dict[str, int]
    memory: int
    memory_per_thread: int


def export_c(
    artifact: Artifact, folder: str | os.PathLike[str], name: str = "model", force: bool = False
) -> Exported:
    """Write ``folder``: ``NAME.h``, ``NAME.c``, ``NAME_kernels.o``, ``NAME.weights``, ``CMakeLists.txt``, ``main.c``, ``README.md``.

    ``name`` is the prefix of every symbol, a C identifier in lower case. The folder is written whole or not at all; one that
    is not empty is refused without ``force``, which replaces these files in it. Raises ExportError for that, and naming the
    operator of a model that is no straight line of kernel calls (a dynamic shape, a function of TVM's runtime).
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _TAKEN.split():
        raise ExportError(
            f"the name {name!r} cannot be a prefix of C functions and a header's name; "
            "give one of lower-case letters, digits and underscores"
        )
    check_folder(Path(folder), force)
    try:
        kernels = _kernels(artifact, name)
    except elf.ElfError as error:
        raise ExportError(
            f"the object file in the model cannot be read: {error}; compile the model again"
        ) from error
    layout = lay_out(artifact)
    sources = _sources(artifact, layout, name)
    files = {name: text.encode() for name, text in sources.items()}
    files[f"{name}_kernels.o"] = kernels
    files[f"{name}.weights"] = layout.weights_file()
    memory, each = _memory(layout)
    readme = _readme(artifact, layout, name, {key: len(data) for key, data in files.items()})
    files["README.md"] = readme.encode()
    write_folder(Path(folder), files, force)
    sizes = {key: len(data) for key, data in files.items()}
    return Exported(Path(folder), name, sizes, memory, each)


def _kernels(artifact: Artifact, name: str) -> bytes:
    """The object file under names of this export. Raises ExportError where C code cannot call its functions."""
    line, data = artifact.manifest.line, artifact.kernels
    if line.refused:
        raise ExportError(f"the model is no straight line of kernel calls: {line.refused}")
    if not elf.is_object(data):
        raise ExportError(
            f"the model is compiled for {artifact.manifest.target}, whose kernels are in no ELF object file"
        )
    symbols = elf.symbols(data)
    defined = {symbol.name for symbol in symbols if symbol.defined}
    transforms = [transform.function for transform in artifact.manifest.weight_transforms]
    for function in (*(call.function for call in line.calls), *transforms):
        if _FUNCTION + function not in defined:
            raise ExportError(
                f"operator {function!r} is a function of TVM's runtime, not compiled code"
            )
    for symbol in symbols:
        if symbol.name.startswith(_OF_TVM) and symbol.name not in (*_CALLBACKS, *defined):
            raise ExportError(
                f"a kernel needs {symbol.name} of TVM's runtime, which C code has not"
            )
    names = {key: f"{name}_kernel_{value}" for key, value in _CALLBACKS.items()}
    for key in defined - set(names):
        names[key] = f"{name}_kernel_{key.removeprefix(_FUNCTION).lstrip('_')}"
    return elf.renamed(data, names)


def _sources(artifact: Artifact, layout: Layout, name: str) -> dict[str, str]:
    manifest = artifact.manifest
    values = {
        "name": name,
        "NAME": name.upper(),
        "target": manifest.target,
        "triple": manifest.triple,
        "architecture": elf.architecture(artifact.kernels),
        "features": " ".join(sorted(manifest.features)),
        "threads": str(manifest.threads),
        "inputs": str(len(layout.inputs)),
        "outputs": str(len(layout.outputs)),
        "tables": tables(layout, manifest, name),
    }
    architecture = values["architecture"]
    cpu = _filled(f"cpu_{architecture}.c", cpu_values(architecture, manifest.features))
    interface, threads, weights, run = (_filled(part, values) for part in _PARTS)
    network = "/* ---- The network. ---- */\n\n" + values["tables"] + "\n"
    return {
        f"{name}.h": _filled("model.h", values),
        f"{name}.c": "\n".join((interface, network, threads, weights, cpu, run)),
        "main.c": _filled("main.c", values),
        "CMakeLists.txt": _filled("CMakeLists.txt", values),
    }


def _filled(template: str, values: dict[str, str]) -> str:
    text = (resources.files("graphopt.export") / "templates" / template).read_text("utf-8")
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], text)


def _memory(layout: Layout) -> tuple[int, int]:
    """About what ``create`` allocates for one thread, and for each further one: tables of a few kilobytes apart."""
    return layout.arena + layout.workspace, layout.workspace


def _described(port: Port, what: str, layout: Layout) -> str:
    sizes = ", ".join(map(str, largest_shape(port)))
    smallest, largest = layout.batch
    batch = f", batch {smallest} to {largest}" if smallest != largest else ""
    text = f"`{port.spec.dtype} [{sizes}]`{batch}, {port.size * largest} bytes"
    return f"- {what} `{port.spec.name}`: {text}"


def _readme(artifact: Artifact, layout: Layout, name: str, sizes: dict[str, int]) -> str:
    whats = {
        f"{name}.h": "the four functions: create, run, query, destroy",
        f"{name}.c": "the network as tables, and the code that runs them",
        f"{name}_kernels.o": "the kernels",
        f"{name}.weights": "the weights, checked when they are read",
        "main.c": "an example: runs the network on files",
        "CMakeLists.txt": "builds a library and the example",
    }
    ins, outs = layout.inputs, layout.outputs
    memory, each = _memory(layout)
    values = {
        "name": name,
        "NAME": name.upper(),
        "version": graphopt.__version__,
        "target": artifact.manifest.target,
        "triple": artifact.manifest.triple,
        "architecture": elf.architecture(artifact.kernels),
        "threads": str(artifact.manifest.threads),
        "files": "\n".join(f"| `{file}` | {whats[file]} | {sizes[file]} |" for file in whats),
        "in_files": " ".join(f"{port.spec.name}.bin" for port in ins),
        "out_files": " ".join(f"{port.spec.name}.bin" for port in outs),
        "tensors": "\n".join(
            [_described(p, "input", layout) for p in ins]
            + [_described(p, "output", layout) for p in outs]
        ),
        "in_buffers": ", ".join(f"{{{p.spec.name}, sizeof {p.spec.name}}}" for p in ins),
        "out_buffers": ", ".join(f"{{{p.spec.name}, sizeof {p.spec.name}}}" for p in outs),
        "input_count": str(len(ins)),
        "output_count": str(len(outs)),
        "memory": str(memory),
        "thread_memory": str(each),
    }
    return _filled("README.md", values)
