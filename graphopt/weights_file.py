"""Tensors as ``safetensors``: ``u64 n | n bytes of JSON {name: {dtype, shape, data_offsets}} | data``.

Written here in 100 lines, so that a session needs no package beyond NumPy and the TVM runtime, and so
that every tensor is copied exactly once, to where compiled kernels read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

ALIGNMENT = 64

_DTYPES = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }
)
_TAGS = MappingProxyType({name: tag for tag, name in _DTYPES.items()})
ELEMENT_TYPES = frozenset(_TAGS)  # those that NumPy has without another package: no bfloat16


class WeightsError(ValueError):
    """The bytes are no valid safetensors; the message is a clause without the file's name."""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return an uninitialised C-contiguous array that begins at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return np.ndarray(shape, dtype, block, start)


def is_aligned(array: np.ndarray[Any, Any], alignment: int = ALIGNMENT) -> bool:
    """Tell whether a kernel can read the array where it is."""
    return bool(array.flags.c_contiguous) and array.ctypes.data % alignment == 0


def encode(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Return the tensors, in their order, as safetensors; raises ``WeightsError`` for a dtype."""
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, tensor in tensors.items():
        tag = _TAGS.get(tensor.dtype.name)
        if tag is None:
            raise WeightsError(f"tensor {name!r} has dtype {tensor.dtype}, which it cannot hold")
        end = offset + tensor.nbytes
        header[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = [len(text).to_bytes(8, "little"), text]
    pieces += [np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values()]
    return b"".join(pieces)


def _read(name: str, entry: Any, data: memoryview, start: int) -> tuple[np.ndarray[Any, Any], int]:
    try:
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"tensor {name!r} has no valid dtype, shape and data_offsets") from error
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise WeightsError(f"tensor {name!r} has a size that is no natural number")
    if begin != start or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
        raise WeightsError(f"tensor {name!r} does not fill the bytes {begin} to {end}")
    return np.frombuffer(data[begin:end], dtype).reshape(shape), end


def decode(data: memoryview) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors as views of ``data``, wherever they lie; raises ``WeightsError``."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 + size:
        raise WeightsError("the header is longer than the file")
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise WeightsError("the header is no JSON") from error
    if not isinstance(header, dict):
        raise WeightsError("the header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    body, end = data[8 + size :], 0
    for name, entry in header.items():  # graphopt writes the header in the order of the data
        tensors[name], end = _read(name, entry, body, end)
    if end != len(body):
        raise WeightsError(f"{len(body) - end} bytes belong to no tensor")
    return tensors
