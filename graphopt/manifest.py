"""``manifest.json``: what a model takes and gives, what it needs of a CPU, and how it was made.

Inputs and outputs are tensors of known shape; a dimension may be a symbol with a range (a dynamic
batch). The output structure is JSON: an integer is the output of that index, and ``{"tuple": [...]}``,
``{"list": [...]}``, ``{"dict": [[key, ...], ...]}``, ``{"value": constant}`` nest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt import straight_line
from graphopt.straight_line import UNRECORDED, StraightLine
from graphopt.weights_file import ALIGNMENT

FORMAT_VERSION = 5


class ManifestError(ValueError):
    """The manifest is malformed; the message is a clause without the file's name."""


@dataclass(frozen=True)
class Dim:
    """A dimension known at the call only: ``low <= size <= high``, equal wherever ``symbol`` is."""

    symbol: str
    low: int = 1
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.symbol} in {self.low}..{'' if self.high is None else self.high}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype and shape of an input, an output or a scratch tensor.

    An input is read where it is if its data begins at a multiple of ``alignment`` bytes. Where ``below`` is set its
    values are indices that compiled code does not check, from 0 on and below it.
    """

    name: str
    dtype: str
    shape: tuple[int | Dim, ...]
    alignment: int = ALIGNMENT
    below: int | None = None

    def describe(self) -> str:
        """``float32 [batch in 1..8, 3, 224, 224]``, or ``int64 [1, 128] of 0..30521``."""
        values = "" if self.below is None else f" of 0..{self.below - 1}"
        return f"{self.dtype} [{', '.join(str(size) for size in self.shape)}]{values}"


@dataclass(frozen=True)
class Kernel:
    """One call of a kernel, in the order of execution, with the model's layers it came from.

    ``macs`` counts one call, at batch 1 of a dynamic batch; ``dtype`` (``int8``, ``float32``) names the
    machine peak it is compared with. ``form`` is the algorithm of a layer that has several ("dense", "winograd",
    "sparse"). Where its weights have zeros to leave out, ``density`` is the share of blocks that remain and
    ``sparse_gain`` what the cost model expects of the sparse form: the dense form's time over its own.
    """

    name: str
    layer: str = ""
    operator: str = ""
    dtype: str = ""
    macs: int | None = None
    form: str = ""
    density: float | None = None
    sparse_gain: float | None = None


@dataclass(frozen=True)
class WeightTransform:
    """A weight that the file holds in another, smaller form: ``function`` of ``model.so`` makes ``result`` of it at loading."""

    weight: str
    function: str
    result: TensorSpec


@dataclass(frozen=True)
class Peak:
    """A function in ``model.so`` that does ``macs`` at the machine's full rate on these tensors."""

    function: str
    dtype: str
    macs: int
    arguments: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """See the module. ``weights`` names the arguments of ``entry`` after the inputs, in their order.

    Where ``image_by_image``, ``entry`` takes one image (dimension 0 of every input is 1) and gives its rows of every
    output: it is run for each image of a batch, the rows stacked in order. ``line`` is what ``entry`` does, for hosts that
    call the kernels themselves. ``gpu`` is the architecture that the kernels are for ("sm_80"); without one, the CPU runs them.
    """

    target: str
    triple: str
    features: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_structure: Any = 0
    weights: tuple[str, ...] = ()
    weight_transforms: tuple[WeightTransform, ...] = ()
    entry: str = "main"
    threads: int = 1
    image_by_image: bool = False
    gpu: str = ""
    kernels: tuple[Kernel, ...] = ()
    line: StraightLine = UNRECORDED
    peaks: tuple[Peak, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self, members: Mapping[str, Mapping[str, Any]]) -> bytes:
        """Return ``manifest.json`` for members given as ``{name: {"sha256", "size"}}``."""
        body = {
            "format": "gopt",
            "format_version": FORMAT_VERSION,
            "members": dict(members),
            **dataclasses.asdict(self),
            "line": self.line.to_json(),
        }
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the manifest as a JSON object of this format version; raises ``ManifestError``."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError("it is no JSON") from error
    if not isinstance(body, dict) or body.get("format") != "gopt":
        raise ManifestError("it does not describe a .gopt file")
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"it has format version {version!r} and this graphopt reads {FORMAT_VERSION}; "
            "compile the model again, or use the graphopt that made it"
        )
    return body


def _size(value: Any) -> int | Dim:
    if isinstance(value, dict):
        return Dim(**value)
    if type(value) is not int or value < 0:
        raise ManifestError(f"{value!r} is no dimension")
    return value


def _spec(value: Mapping[str, Any]) -> TensorSpec:
    fields = {**value, "shape": tuple(_size(size) for size in value["shape"])}
    return TensorSpec(**fields)


def _peak(value: Mapping[str, Any]) -> Peak:
    return Peak(**{**value, "arguments": tuple(_spec(item) for item in value["arguments"])})


def _transform(value: Mapping[str, Any]) -> WeightTransform:
    return WeightTransform(**{**value, "result": _spec(value["result"])})


def _line(value: Mapping[str, Any], inputs: int, weights: int) -> StraightLine:
    """The line of a network with so many inputs and weights."""
    counts = {"input": inputs, "weight": weights}
    try:
        line = straight_line.from_json(value)
        for tensor in line.tensors:
            if tensor.index >= counts.get(tensor.memory, math.inf):
                raise ValueError(f"tensor {str(tensor)!r} is of no {tensor.memory} of the network")
    except ValueError as error:
        raise ManifestError(f"its line of calls is malformed: {error}") from error
    return line


def check_structure(structure: Any, count: int) -> None:
    """Raise ``ManifestError`` unless every leaf of an output structure is one of ``count`` outputs."""
    if type(structure) is int and 0 <= structure < count:
        return
    if not isinstance(structure, dict) or len(structure) != 1:
        raise ManifestError(f"{structure!r} is no structure of {count} outputs")
    ((kind, items),) = structure.items()
    if kind == "value":
        return
    if kind not in ("tuple", "list", "dict") or not isinstance(items, list):
        raise ManifestError(f"{kind!r} is no kind of output structure")
    for item in items:
        check_structure(item[1] if kind == "dict" else item, count)


def from_json(body: Mapping[str, Any]) -> Manifest:
    """Return the manifest that ``to_json`` wrote; raises ``ManifestError`` naming what is wrong."""
    known = {item.name for item in dataclasses.fields(Manifest)}
    try:
        values = {key: body[key] for key in known}
        for key, read in (
            ("inputs", _spec),
            ("outputs", _spec),
            ("peaks", _peak),
            ("weight_transforms", _transform),
            ("kernels", lambda item: Kernel(**item)),
        ):
            values[key] = tuple(read(item) for item in values[key])
        for key in ("features", "weights", "history"):
            values[key] = tuple(values[key])
        values["line"] = _line(values["line"], len(values["inputs"]), len(values["weights"]))
        manifest = Manifest(**values)
        check_structure(manifest.output_structure, len(manifest.outputs))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ManifestError(f"a field is missing or malformed ({error})") from error
    return manifest
