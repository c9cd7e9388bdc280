"""Where every tensor of a straight line lies in the memories of a C program: the weights file, one arena, the inputs.

The arena holds the planned storages, results, weights that are made when an instance is created, and copies of inputs that
kernels cannot read where they are, each at a multiple of 64 bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import ExportError
from graphopt.export.bounds import check_bounds
from graphopt.manifest import Dim, TensorSpec
from graphopt.straight_line import Call, Tensor

if TYPE_CHECKING:
    from graphopt.artifact import Artifact

ALIGNMENT = 64
WEIGHTS, ARENA, FIRST_INPUT = range(3)
_MAGIC, _VERSION, _HEADER_BYTES = b"gopt-wts", 1, 64
_INDEX_DTYPES = ("int32", "int64")


@dataclass(frozen=True)
class Placed:
    """A tensor ``offset`` bytes into one of the memories."""

    base: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """An input or output: ``size`` bytes of one run of the kernels, which tensor it is, where an input is copied to."""

    spec: TensorSpec
    size: int
    tensor: int = 0
    copy: int = 0

    @property
    def element(self) -> int:
        return np.dtype(self.spec.dtype).itemsize


@dataclass
class Layout:
    """Tensors in their places, calls on them, and the sizes of the memories; ``batch`` is what a run may choose from."""

    tensors: list[Placed] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    transforms: list[Call] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    weights: bytes = field(default=b"", repr=False)
    arena: int = 0
    workspace: int = 0
    batch: tuple[int, int] = (1, 1)

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.weights)

    def weights_file(self) -> bytes:
        """A header of 64 bytes, then the data."""
        header = struct.pack("<8sIIQ", _MAGIC, _VERSION, self.checksum, len(self.weights))
        return header.ljust(_HEADER_BYTES, b"\0") + self.weights


def lay_out(artifact: Artifact) -> Layout:
    """Give every tensor of the artifact's line its place.

    Raises ExportError where it is for no fixed sizes, ArtifactError where a tensor is outside of its memory.
    """
    check_bounds(artifact)
    manifest, line = artifact.manifest, artifact.manifest.line
    layout = Layout(workspace=_rounded(line.workspace), batch=_batch(artifact))
    stored = _place_weights(layout, artifact)
    storages = [_reserve(layout, size) for size in line.storages]
    results = [_reserve(layout, size) for size in line.results]
    made = {t.weight: _reserve(layout, _spec_bytes(t.result)) for t in manifest.weight_transforms}

    def placed(tensor: Tensor) -> Placed:
        match tensor.memory:
            case "input":
                return Placed(FIRST_INPUT + tensor.index, tensor.offset, tensor.dtype, tensor.shape)
            case "weight":
                name = manifest.weights[tensor.index]
                base, start = (ARENA, made[name]) if name in made else (WEIGHTS, stored[name])
            case _:
                starts = storages if tensor.memory == "storage" else results
                base, start = ARENA, starts[tensor.index]
        return Placed(base, start + tensor.offset, tensor.dtype, tensor.shape)

    layout.tensors = [placed(tensor) for tensor in line.tensors]
    layout.calls = list(line.calls)
    for transform in manifest.weight_transforms:
        array, result = artifact.weights[transform.weight], transform.result
        source = Placed(WEIGHTS, stored[transform.weight], array.dtype.name, array.shape)
        target = Placed(ARENA, made[transform.weight], result.dtype, _static(result))
        layout.transforms.append(Call(transform.function, _added(layout, (source, target))))
    _place_ports(layout, artifact)
    return layout


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _reserve(layout: Layout, size: int) -> int:
    start = layout.arena
    layout.arena += _rounded(size)
    return start


def _added(layout: Layout, tensors: Iterable[Placed]) -> tuple[int, ...]:
    first = len(layout.tensors)
    layout.tensors.extend(tensors)
    return tuple(range(first, len(layout.tensors)))


def _place_weights(layout: Layout, artifact: Artifact) -> dict[str, int]:
    """Put the arrays behind each other and return where each begins."""
    places, data = {}, bytearray()
    for name, array in artifact.weights.items():
        data += bytes(-len(data) % ALIGNMENT)
        places[name] = len(data)
        data += np.ascontiguousarray(array).tobytes()
    layout.weights = bytes(data)
    return places


def _static(spec: TensorSpec) -> tuple[int, ...]:
    sizes = [size for size in spec.shape if isinstance(size, int)]
    if len(sizes) != len(spec.shape):
        raise ExportError(f"tensor {spec.name!r} is {spec.describe()}, which is no fixed size")
    return tuple(sizes)


def _spec_bytes(spec: TensorSpec) -> int:
    return int(np.prod(_static(spec), dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _batch(artifact: Artifact) -> tuple[int, int]:
    """The images of a run: kernels that take one are run for each."""
    if not artifact.manifest.image_by_image:
        return (1, 1)
    first = artifact.manifest.inputs[0].shape[0]
    if not isinstance(first, Dim):
        return (first, first)
    if first.high is None:
        raise ExportError(f"dimension {first} has no largest size; compile with a range of batches")
    return (first.low, first.high)


def _place_ports(layout: Layout, artifact: Artifact) -> None:
    line = artifact.manifest.line
    for number, spec in enumerate(artifact.manifest.inputs):
        used = [t for t in line.tensors if (t.memory, t.index) == ("input", number)]
        if not used or (spec.below is not None and spec.dtype not in _INDEX_DTYPES):
            raise ExportError(f"input {spec.name!r} of {spec.describe()} cannot be checked in C")
        port = Port(spec, used[0].bytes)
        if spec.alignment > port.element:
            port = replace(port, copy=_reserve(layout, port.size))
        layout.inputs.append(port)
    for spec, number in zip(artifact.manifest.outputs, line.outputs, strict=True):
        layout.outputs.append(Port(spec, line.tensors[number].bytes, number))
