"""Exports that are built with the machine's compiler and run: as a program on files, and through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.artifact import Artifact
from graphopt.export import export_c

Array = np.ndarray[Any, Any]

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")


class Small(nn.Module):
    """Strided, Winograd, depthwise and pointwise convolutions, a residual add, a pool, a linear layer, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.wide = nn.Conv2d(32, 32, 3, 1, 1)
        self.deep = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def logits(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.deep(torch.relu(self.wide(x))))
        result: Tensor = self.head((x + self.point(y)).mean((2, 3)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.logits(x), 1)


class Logits(Small):
    """Without the softmax: integers from the first quantize to the last dequantize."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class Several(nn.Module):
    """Indices, two more inputs, a table that is a constant, outputs that are an input and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.line = nn.Linear(6, 6)

    def forward(self, words: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = self.line(self.table(words)) * mask + x
        return y[:, torch.arange(4)], (y > 0), x, self.line.weight


def example(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    integer: bool = False,
    batch: tuple[int, int] | None = None,
    **options: Any,
) -> Artifact:
    """The model with seeded weights as it was made; on int8 calibrated with its own inputs."""
    program = go.capture(model.eval(), inputs, dynamic_batch=batch)
    if integer:
        program = go.passes.Quantize(calibration=[inputs])(program)
    return go.compile(program, **options)


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make()


def build(folder: Path, *options: str, cc: str = "gcc", output: str = "") -> Path:
    """Compile the example with warnings as errors; the result is a program, or what ``options`` ask for."""
    name = folder.name
    path = folder / (output or f"run_{name}")
    sources = [] if "-shared" in options else ["main.c"]
    command = [
        cc,
        "-std=c11",
        "-O1",
        "-fPIC",
        *WARNINGS,
        *options,
        *sources,
        f"{name}.c",
        f"{name}_kernels.o",
    ]
    subprocess.run([*command, "-lm", "-pthread", "-o", str(path)], cwd=folder, check=True)
    return path


def exported(artifact: Artifact, folder: Path) -> Path:
    """The export under the folder's own name."""
    export_c(artifact, folder, folder.name)
    return folder


def run(
    folder: Path,
    artifact: Artifact,
    inputs: Sequence[Array],
    threads: int = 1,
    runner: Sequence[str] = (),
) -> list[bytes]:
    """The bytes that the built example writes."""
    names = [f"in{i}.bin" for i in range(len(inputs))]
    outputs = [f"out{i}.bin" for i in range(len(artifact.manifest.outputs))]
    for name, array in zip(names, inputs, strict=True):
        array.tofile(folder / name)
    program = [*runner, str(folder / f"run_{folder.name}")]
    command = [*program, "-t", str(threads), f"{folder.name}.weights", *names, *outputs]
    subprocess.run(command, cwd=folder, check=True)
    return [(folder / name).read_bytes() for name in outputs]


def leaves(value: Any) -> list[Array]:
    """The arrays of a session's result."""
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def wanted(artifact: Artifact, inputs: Sequence[Array]) -> list[bytes]:
    """The bytes of a session's outputs."""
    return [array.tobytes() for array in leaves(artifact.session(threads=1)(*inputs))]


class Options(ctypes.Structure):
    _fields_ = [
        ("weights_path", ctypes.c_char_p),
        ("weights", ctypes.c_void_p),
        ("weights_size", ctypes.c_size_t),
        ("threads", ctypes.c_int),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Description(ctypes.Structure):
    _fields_ = [
        ("target", ctypes.c_char_p),
        ("features", ctypes.c_char_p),
        ("input_count", ctypes.c_size_t),
        ("output_count", ctypes.c_size_t),
        ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("smallest_batch", ctypes.c_size_t),
        ("largest_batch", ctypes.c_size_t),
        ("weights_size", ctypes.c_size_t),
        ("memory", ctypes.c_size_t),
        ("memory_per_thread", ctypes.c_size_t),
        ("messages", ctypes.POINTER(ctypes.c_char_p)),
    ]


def buffers(arrays: Sequence[Array]) -> Any:
    return (Buffer * len(arrays))(*[Buffer(a.ctypes.data, a.nbytes) for a in arrays])


@dataclass(frozen=True)
class Library:
    """An export as a shared library, by its four functions."""

    folder: Path
    library: ctypes.CDLL

    @staticmethod
    def load(folder: Path, *options: str) -> Library:
        path = build(folder, "-shared", *options, output=f"lib{folder.name}.so")
        library = Library(folder, ctypes.CDLL(str(path)))
        library.function("query").restype = ctypes.POINTER(Description)
        library.function("destroy").restype = None
        library.function("destroy").argtypes = [ctypes.c_void_p]
        return library

    def function(self, name: str) -> Any:
        return getattr(self.library, f"{self.folder.name}_{name}")

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.folder.name}.weights"

    def query(self) -> Any:
        return self.function("query")().contents

    def message(self, status: int) -> str:
        return str(self.query().messages[status].decode())

    def create(
        self, path: Path | None = None, threads: int = 1, memory: Array | None = None
    ) -> Any:
        """An instance; raises ``RuntimeError`` with the message of the status."""
        options = Options(str(path or self.weights).encode(), None, 0, threads)
        if memory is not None:
            options = Options(None, memory.ctypes.data, memory.nbytes, threads)
        model = ctypes.c_void_p()
        status = self.function("create")(ctypes.byref(model), ctypes.byref(options))
        if status:
            assert model.value is None
            raise RuntimeError(self.message(status))
        return model

    def run(self, model: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Raises ``RuntimeError`` with the message of the status."""
        counts = ctypes.c_size_t(len(inputs)), ctypes.c_size_t(len(outputs))
        status = self.function("run")(
            model, buffers(inputs), counts[0], buffers(outputs), counts[1]
        )
        if status:
            raise RuntimeError(self.message(status))

    def destroy(self, model: Any) -> None:
        self.function("destroy")(model)
