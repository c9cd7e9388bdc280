"""What all substitutions share: which layers, what they read, which of them lose least, and their history."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.contract import Contract, lossy
from graphopt.edit import Build, Edit
from graphopt.errors import PassError
from graphopt.passes import layer as layers_of
from graphopt.passes.compact.inputs import windows
from graphopt.passes.patches import each, margins
from graphopt.passing import Pass

PART = "_compact_"  # in the name of a parameter that a substitution made


@dataclass(frozen=True)
class Layer:
    """A convolution that may be substituted, with its float weight [out, in, k, l]."""

    node: fx.Node
    weight: Tensor
    bias: Tensor | None

    @property
    def stride(self) -> list[int]:
        return each(ops.bind(self.node)["stride"], 2)

    @property
    def padding(self) -> list[int]:
        """On either side: ``"same"`` is symmetric for the odd kernels that are substituted."""
        return margins(self.node)[0]

    @property
    def dilation(self) -> list[int]:
        return each(ops.bind(self.node)["dilation"], 2)

    @property
    def made(self) -> list[int]:
        """The output's sizes [N, C, H, W] (a dynamic batch at its example)."""
        return [ops._hint(size) for size in self.node.meta["val"].shape]

    @property
    def given(self) -> list[int]:
        """The input's sizes."""
        return [ops._hint(size) for size in ops.bind(self.node)["input"].meta["val"].shape]

    @property
    def parameters(self) -> int:
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def offset(self) -> list[int]:
        """Where output 0's middle tap stands in the input: 0 where the padding is half of the kernel."""
        kernel = self.weight.shape[2:]
        return [
            d * (k // 2) - p for d, k, p in zip(self.dilation, kernel, self.padding, strict=True)
        ]


@dataclass(frozen=True)
class Cost:
    parameters: int
    macs: int


@dataclass(frozen=True)
class Fitted:
    """A substitute with its weights: the error of the layer's output, what it is, and how to build it."""

    error: float
    text: str
    build: Callable[[Build], fx.Node]


@dataclass(frozen=True)
class Substitute(Pass):
    """A convolution becomes something smaller that begins near what it computed and is meant to be trained again.

    ``share`` of the layers that fit are substituted, those whose output is kept best. ``layers`` and ``exclude`` name
    layers (operators, globs of node names or module paths). ``calibration``, an iterable of input batches, gives the
    activations that the new weights are fitted to, ``rows`` positions a layer; without, noise stands in for them.
    """

    contract: ClassVar[Contract] = lossy

    share: float = 1.0
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    rows: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PassError(f"{self.name}: share must be above 0 and at most 1, not {self.share}")
        if self.rows < 64:
            raise PassError(f"{self.name}: rows must be at least 64, not {self.rows}")

    @abstractmethod
    def unfit(self, layer: Layer) -> str | None:
        """Why this substitution does not apply to a layer, or None."""

    @abstractmethod
    def cost(self, layer: Layer) -> Cost:
        """Of the substitute."""

    def fixed(self, layer: Layer) -> Tensor | None:
        """The bias that stays where there is no data: of noise, neither the size nor the mean is the layer's."""
        if self.calibration is not None:
            return None
        return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias

    @abstractmethod
    def fit(self, layer: Layer, inputs: Tensor) -> Fitted:
        """The substitute, fitted on windows [rows, in, k, l] of the layer's input."""

    def apply(self, edit: Edit) -> None:
        chosen = list(self._layers(edit))
        if not chosen:
            edit.note("no layer to substitute")
            return
        rows = windows(
            edit, [layer.node for layer in chosen], self.calibration, self.rows, self.seed
        )
        fitted = [
            (layer, self.fit(layer, rows.pop(layer.node)))
            for layer in edit.progress(chosen, "fitting", len(chosen))
        ]
        fitted.sort(key=lambda pair: pair[1].error)
        count = max(1, round(self.share * len(fitted)))
        for layer, substitute in fitted[:count]:
            self._substitute(edit, layer, substitute)
        for layer, substitute in fitted[count:]:
            edit.decline(
                layer.node,
                f"share {self.share:g} is spent on layers that lose less than its {substitute.error:.3g}",
            )

    def _layers(self, edit: Edit) -> Iterator[Layer]:
        for node in edit.nodes("conv2d", "conv2d_same"):
            if not layers_of.chosen(node, self.layers, self.exclude):
                continue
            reason = self._read(edit, node)
            if isinstance(reason, Layer):
                yield reason
            else:
                edit.decline(node, reason)

    def _read(self, edit: Edit, node: fx.Node) -> Layer | str:
        """The layer, or why it stays."""
        weight = layers_of.constant_weight(edit, node)
        if isinstance(weight, str):
            return weight
        arguments = ops.bind(node)
        bias = arguments["bias"]
        if PART in str(arguments["weight"].target):
            return "it is part of a substitute already"
        if bias is not None and bias.op != "get_attr":
            return "its bias is computed"
        if not bool(weight.isfinite().all()):
            return "its weight holds NaN or infinity"
        if arguments["groups"] != 1:
            return f"its {arguments['groups']} groups do not mix channels"
        held = None if bias is None else edit.program.tensor(bias).detach().float()
        layer = Layer(node, weight.float(), held)
        reason = self.unfit(layer)
        if reason is not None:
            return reason
        cost, macs = self.cost(layer), ops.macs(node)
        if cost.parameters >= layer.parameters or cost.macs >= macs:
            return (
                f"its substitute has {cost.parameters:,} parameters and {cost.macs:,} MACs "
                f"for {layer.parameters:,} and {macs:,}"
            )
        return layer

    def _substitute(self, edit: Edit, layer: Layer, substitute: Fitted) -> None:
        node, cost = layer.node, self.cost(layer)
        before = layer.parameters, ops.macs(node)
        new = substitute.build(edit.build(node, [node]))
        counts = (before[0], cost.parameters), (before[1], cost.macs)
        edit.layer_changed(node, *counts, substitute.error, substitute.text)
        edit.replace(node, new)


def outputs_of(layer: Layer, inputs: Tensor) -> Tensor:
    """What the layer computes at windows [rows, in, k, l]: [rows, out]."""
    made = inputs.flatten(1) @ layer.weight.flatten(1).T
    return made if layer.bias is None else made + layer.bias


def macs(sizes: Iterable[int], shape: Iterable[int]) -> int:
    """Of a convolution with a weight of ``shape`` at ``sizes`` [N, H, W] of its output."""
    return math.prod(sizes) * math.prod(shape)


class Maker:
    """Builds a substitute's convolutions; its parameters are named after the layer's weight."""

    def __init__(self, build: Build, layer: Layer) -> None:
        self.build = build
        self.layer = layer
        weight = ops.bind(layer.node)["weight"]
        self._name = f"{weight.target}{PART}"
        self._dtype = weight.meta["val"].dtype

    def convolution(
        self,
        x: fx.Node,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> fx.Node:
        parameters = [
            None
            if tensor is None
            else self.build.parameter(f"{self._name}{kind}", tensor.to(self._dtype).contiguous())
            for kind, tensor in ((name, weight), (f"{name}_bias", bias))
        ]
        return self.build.conv2d(x, *parameters, stride, padding, dilation, 1)

    def pointwise(self, x: fx.Node, name: str, weight: Tensor, bias: Tensor) -> fx.Node:
        """A 1 x 1 convolution [out, in] at the places where the layer's middle tap stands, at its stride."""
        offset = self.layer.offset()
        for axis, start in enumerate(offset):
            if start > 0:
                size = int(x.meta["val"].shape[2 + axis])
                x = self.build.slice(x, 2 + axis, start, size - start)
        padding = [max(0, -start) for start in offset]
        full = weight[:, :, None, None]
        return self.convolution(x, name, full, bias, self.layer.stride, padding, [1, 1])


def projection(weight: Tensor, root: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``P [width, in, taps], Q [columns, width]``, ``Q P ~= weight [columns, in, taps]`` best for inputs of some covariance.

    ``root root^T`` is that of the channels, the same at every tap. Q P is the truncated SVD of the whitened weight.
    """
    columns, inputs, taps = weight.shape
    whitened = torch.einsum("cit,ij->cjt", weight.double(), root).reshape(columns, -1)
    _, vectors = torch.linalg.eigh(whitened.T @ whitened)
    kept = vectors.flip(1)[:, :width]
    first = kept.T.reshape(width, inputs, taps).transpose(1, 2).flatten(0, 1)
    first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
    first = first.reshape(width, taps, inputs).transpose(1, 2)
    return first.float().contiguous(), (whitened @ kept).float()
