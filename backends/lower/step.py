"""``Step``: one kernel call in the plan of a network, before its layouts are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

import graphopt.integer  # noqa: F401 - defines torch.ops.graphopt
from graphopt.arrays import to_numpy
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.convert import convert
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.packed_zeros import is_worth, pack, unpacker
from graphopt.backends.cpu.workload import Conv2d, Convert, Layout
from graphopt.errors import CompileError
from graphopt.program import Program

DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.uint8: "uint8",
    torch.int8: "int8",
}
BYTES_PER_DOT = 4  # bytes of input channels that one integer dot product takes


@dataclass(frozen=True)
class Margins:
    """Padding around a map that the kernels reading it touch."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def union(self, other: Margins) -> Margins:
        return Margins(
            max(self.top, other.top),
            max(self.bottom, other.bottom),
            max(self.left, other.left),
            max(self.right, other.right),
        )


class KernelSource(ABC):
    """Makes code of steps, for one kind of target; see ``Context`` for CPUs."""

    program: Program

    def array(self, node: fx.Node) -> np.ndarray[Any, Any]:
        """The parameter that a ``get_attr`` node reads, or a cast of one makes, as NumPy."""
        return to_numpy(self._constant(node).contiguous())

    def _constant(self, node: fx.Node) -> torch.Tensor:
        if node.op == "get_attr":
            return self.program.tensor(node).detach()
        return self._constant(node.all_input_nodes[0]).to(value_of(node).dtype)

    @abstractmethod
    def kernel(self, step: Step, inputs: list[Layout], output: Layout) -> Kernel:
        """The code of a step on these layouts."""

    @abstractmethod
    def convert(self, workload: Convert) -> Kernel:
        """The code of a conversion."""


@dataclass(frozen=True)
class Context(KernelSource):
    """Code for CPUs; ``choices`` are tuned ones, by ``candidates.workload_key``."""

    program: Program
    isa: Isa
    threads: int
    choices: Mapping[str, ConvChoice] = field(default_factory=dict)

    def kernel(self, step: Step, inputs: list[Layout], output: Layout) -> Kernel:
        return _without_zeros(step.kernel(self, inputs, output))

    def convert(self, workload: Convert) -> Kernel:
        function = convert(workload, self.isa, self.threads)
        return Kernel(str(function.attrs["global_symbol"]), function)


@dataclass(frozen=True)
class LoadTransform:
    """A function on ``stored, constant`` that a session runs once: the constant (``size`` of ``dtype``) is in no file."""

    name: str
    function: Any
    size: int
    dtype: str


@dataclass(frozen=True)
class Kernel:
    """A step as code: a TIR function, its constant arguments, and what it counts as in a benchmark.

    ``tunable`` is its workload, where tuning has other choices for it. The first constant is what ``load_transform``
    makes of the stored one, where there is one. ``form`` is the algorithm of a layer that has several; ``density`` and
    ``sparse_gain`` are those of ``manifest.Kernel`` where no plan of orders has compared the layer's forms. ``before`` makes
    what this one reads in the place of the step's first input.
    """

    name: str
    function: Any
    constants: tuple[np.ndarray[Any, Any], ...] = ()
    macs: int = 0
    tunable: Conv2d | None = None
    load_transform: LoadTransform | None = None
    form: str = ""
    density: float | None = None
    sparse_gain: float | None = None
    before: Before | None = None


def _without_zeros(kernel: Kernel) -> Kernel:
    """The kernel whose first constant, where that is mostly zeros, is in the file without them."""
    if kernel.load_transform is not None or not kernel.constants:
        return kernel
    weight, *others = kernel.constants
    if weight.dtype != np.int8 or not is_worth(weight):
        return kernel
    function = unpacker(weight.size)
    name = str(function.attrs["global_symbol"])
    transform = LoadTransform(name, function, weight.size, "int8")
    return replace(kernel, constants=(pack(weight), *others), load_transform=transform)


@dataclass(frozen=True)
class Before:
    """A kernel of the step's first input alone; its result is ``shape`` of ``dtype`` for each image."""

    kernel: Kernel
    shape: tuple[int, ...]
    dtype: str


class Step(ABC):
    """One kernel call: which values it reads and makes, and in which form.

    ``inputs`` and ``output`` are nodes of the program (the values between them vanish into the kernel); ``nodes`` are
    all the nodes the call replaces. A value is *physical* (NHWC by a ``Layout``) or *plain* (contiguous, as PyTorch
    holds it); ``plain_inputs[i]`` and ``plain_output`` say which this step takes and makes. Where all are plain the
    kernel sees ``dense_rows``; else a plain one is in NCHW order. ``whole_dots``: the kernel reads the channels of a
    row in groups of four bytes.
    """

    whole_dots = False

    def __init__(self, nodes: list[fx.Node], inputs: list[fx.Node], output: fx.Node) -> None:
        self.nodes = nodes
        self.inputs = inputs
        self.output = output
        self.plain_inputs = [False] * len(inputs)
        self.plain_output = False

    @property
    def is_rows(self) -> bool:
        """True where every port is plain: the kernel sees rows of channels, whatever the tensors' rank."""
        return all(self.plain_inputs) and self.plain_output

    def margins(self, index: int) -> Margins:
        """Padding that this step reads around input ``index``."""
        return Margins()

    def fill(self, index: int) -> int:
        """The value that this step expects there."""
        return 0

    @abstractmethod
    def kernel(self, context: Context, inputs: list[Layout], output: Layout) -> Kernel:
        """The code for these layouts."""


def value_of(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def dtype_of(node: fx.Node) -> str:
    return DTYPES[value_of(node).dtype]


def is_parameter(node: fx.Node) -> bool:
    """True where a ``get_attr`` node reads the value, or a cast makes it of one that does."""
    while node.op == "call_function" and node.target is torch.ops.aten.to.dtype:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def is_integer_op(node: fx.Node) -> bool:
    """True for calls of ``graphopt::`` operators."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "graphopt"


def rank(node: fx.Node) -> int:
    return value_of(node).dim()


def pair(value: Any) -> tuple[int, int]:
    """ATen's ``3``, ``[3]`` or ``[3, 5]`` as (height, width)."""
    values = [value] if isinstance(value, int) else list(value)
    return values[0], values[-1]


def _static(node: fx.Node, size: Any) -> int:
    if isinstance(size, torch.SymInt):
        raise CompileError(
            f"node {node.name!r} has a dynamic size besides its batch; "
            "capture with fixed sizes (only dimension 0 may be a range)"
        )
    return int(size)


def _batch(node: fx.Node) -> int | None:
    size = value_of(node).shape[0]
    return None if isinstance(size, torch.SymInt) else int(size)


def _stored(layout: Layout) -> Layout:
    """With the channel stride that kernels of this dtype read: whole dot products of bytes."""
    if layout.dtype == "float32":
        return layout
    return replace(layout, channel_stride=-(-layout.channels // BYTES_PER_DOT) * BYTES_PER_DOT)


def image_layout(node: fx.Node) -> Layout:
    """``[N, C, H, W]`` or ``[N, C]`` as NHWC without margins or pad channels."""
    shape = value_of(node).shape
    channels, *size = (_static(node, extent) for extent in shape[1:])
    height, width = size or (1, 1)
    return Layout(_batch(node), height, width, channels, dtype_of(node))


def physical_layout(node: fx.Node, margins: Margins, fill: int) -> Layout:
    """How a physical value lies in memory."""
    layout = _stored(image_layout(node))
    return replace(
        layout,
        top=margins.top,
        bottom=margins.bottom,
        left=margins.left,
        right=margins.right,
        fill=fill,
    )


def dense_rows(node: fx.Node) -> Layout:
    """A contiguous tensor of any rank as ``N x 1 x (product of the middle) x (last)``."""
    shape = value_of(node).shape
    if len(shape) == 0:
        return Layout(1, 1, 1, 1, dtype_of(node))
    if len(shape) == 1:
        return Layout(_batch(node), 1, 1, 1, dtype_of(node))
    middle = 1
    for extent in shape[1:-1]:
        middle *= _static(node, extent)
    return Layout(_batch(node), 1, middle, _static(node, shape[-1]), dtype_of(node))


def padded_rows(node: fx.Node) -> Layout:
    """``dense_rows`` with the channel stride that matrix kernels read."""
    return _stored(dense_rows(node))
