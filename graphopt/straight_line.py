"""The network as a straight line: calls of kernels on tensors whose memory is planned.

It is what memory planning leaves of the Relax function, recorded when a model is compiled, so that hosts other than TVM's
virtual machine can run the same code (``graphopt export``). A tensor is its bytes from ``offset`` on in one memory:

- ``input i``: argument i of a run; ``weight i``: weight i of the manifest, as the kernels take it;
- ``storage i``: planned bytes that tensors share in turn;
- ``result i``: a tensor that no other shares the memory with, which an output may be.

A network that is no such line (a dynamic shape, an element type that NumPy lacks, a function of TVM's runtime) has ``refused``,
a clause that names the operator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.weights_file import ELEMENT_TYPES

MEMORIES = ("input", "weight", "storage", "result")
_TENSOR = re.compile(rf"({'|'.join(MEMORIES)}) (\d+)\+(\d+) (\w+) \[((?:\d+(?:, \d+)*)?)\]")


@dataclass(frozen=True)
class Tensor:
    """Contiguous elements in one of the memories."""

    memory: str
    index: int
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.memory} {self.index}+{self.offset} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """``function(tensors[i] for i in arguments)``; the results are among the arguments."""

    function: str
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join((self.function, *map(str, self.arguments)))


@dataclass(frozen=True)
class StraightLine:
    """``storages`` and ``results`` are sizes in bytes, ``outputs`` numbers of tensors, ``workspace`` the bytes that one thread
    of any kernel, or of a weight transform, asks for while it runs, each piece at a multiple of 64."""

    storages: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    calls: tuple[Call, ...] = ()
    outputs: tuple[int, ...] = ()
    workspace: int = 0
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """A line of text for a tensor or a call."""
        if self.refused:
            return {"refused": self.refused}
        return {
            "storages": list(self.storages),
            "results": list(self.results),
            "tensors": [str(tensor) for tensor in self.tensors],
            "calls": [str(call) for call in self.calls],
            "outputs": list(self.outputs),
            "workspace": self.workspace,
        }


UNRECORDED = StraightLine(refused="it was not recorded")


def from_json(body: Mapping[str, Any]) -> StraightLine:
    """What ``to_json`` wrote. Raises ``ValueError`` for other values, ``KeyError`` and ``TypeError`` for other JSON."""
    if set(body) == {"refused"}:
        return StraightLine(refused=str(body["refused"]))
    line = StraightLine(
        tuple(map(_number, body["storages"])),
        tuple(map(_number, body["results"])),
        tuple(map(_tensor, body["tensors"])),
        tuple(map(_call, body["calls"])),
        tuple(map(_number, body["outputs"])),
        _number(body["workspace"]),
    )
    _check(line)
    return line


def _number(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _tensor(text: str) -> Tensor:
    match = _TENSOR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no tensor")
    memory, index, offset, dtype, sizes = match.groups()
    shape = tuple(map(int, sizes.split(", "))) if sizes else ()
    if dtype not in ELEMENT_TYPES:
        raise ValueError(f"{text!r} is of no known dtype")
    return Tensor(memory, int(index), int(offset), dtype, shape)


def _call(text: str) -> Call:
    function, *arguments = text.split(" ")
    if not re.fullmatch(r"[A-Za-z_]\w*", function, re.ASCII):
        raise ValueError(f"{function!r} is no name of a function")
    return Call(function, tuple(map(int, arguments)))


def _check(line: StraightLine) -> None:
    """Tensors lie inside of their memory, numbers of tensors are of tensors."""
    if min(*line.storages, *line.results, line.workspace, 0) < 0:
        raise ValueError("a size is negative")
    sizes = {"storage": line.storages, "result": line.results}
    for tensor in line.tensors:
        owned = sizes.get(tensor.memory)
        if owned is None:
            continue
        if tensor.index >= len(owned) or tensor.offset + tensor.bytes > owned[tensor.index]:
            raise ValueError(f"tensor {str(tensor)!r} is not inside of its memory")
    used = [*line.outputs, *(number for call in line.calls for number in call.arguments)]
    if not all(0 <= number < len(line.tensors) for number in used):
        raise ValueError("a call or an output names a tensor that is not there")
