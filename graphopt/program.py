"""``Program``: a captured network as a ``torch.fx.GraphModule`` of ATen ops, with its inputs and its history.

A program runs (``program(x)``), trains (its parameters are those of the module), and is never changed by a pass:
passes work on ``clone()``, which copies the graph and shares every tensor. ``train()`` and ``eval()`` switch the program
itself, as a module's do.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt import modes, ops
from graphopt.errors import InputError


@dataclass(frozen=True)
class LayerChange:
    """What a pass did to one layer. ``error`` is ``||W - W'|| / ||W||``, or that of the layer's output on data."""

    node: str
    layer: str  # the module's path in the user's model, "" where there is none
    parameters: tuple[int, int]  # before, after
    macs: tuple[int, int]
    error: float | None = None
    text: str = ""  # "rank 32"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "parameters": list(self.parameters), "macs": list(self.macs)}


@dataclass(frozen=True)
class Record:
    """What one pass did: counted and measured by the driver, never claimed by the pass."""

    name: str
    options: dict[str, Any]
    contract: str
    rewrites: int
    declines: tuple[tuple[str, str], ...]  # (node, reason)
    parameters: tuple[int, int]  # before, after
    macs: tuple[int, int]
    error: float | None  # largest difference on the example inputs, relative to the largest output
    seconds: float
    notes: tuple[str, ...] = ()
    layers: tuple[LayerChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "options": self.options,
            "contract": self.contract,
            "rewrites": self.rewrites,
            "declines": [{"node": node, "reason": reason} for node, reason in self.declines],
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "error": self.error,
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
        }


@dataclass(frozen=True)
class LayerStats:
    """One operator's share: MACs at the example shapes, parameters and the bytes that hold them."""

    node: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    nonzero: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    """Totals and a row a layer. A parameter used by two layers counts once in the totals."""

    parameters: int
    nonzero: int
    macs: int
    bytes: int
    layers: tuple[LayerStats, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in ("parameters", "nonzero", "macs", "bytes")}
        return {**totals, "layers": [vars(layer) for layer in self.layers]}


class ProgramModule(fx.GraphModule):
    """The module of a program: ``train(mode)`` rewrites the flags of the graph's calls, as loops of one's own expect."""

    def train(self, mode: bool = True) -> ProgramModule:
        """Batch norm and dropout train (or evaluate); the graph is changed in place. Returns itself."""
        modes.set_mode(self.graph, mode)
        self.recompile()
        super().train(mode)
        return self


@dataclass(frozen=True, eq=False)
class Program:
    """A captured network. Made by ``graphopt.capture``; passes return new ones.

    ``example_inputs`` are the positional arguments it was captured with; ``dynamic_batch`` is the inclusive range of
    dimension 0, or None where every size is fixed.
    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    dynamic_batch: tuple[int, int] | None = None
    history: tuple[Record, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, one a tensor, in the order of the flattened arguments."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def __call__(self, *inputs: Any) -> Any:
        """Run in PyTorch. Raises InputError for a wrong number of inputs, a wrong rank, shape or dtype."""
        self.check_inputs(*inputs)
        return self.graph_module(*inputs)

    def check_inputs(self, *inputs: Any) -> None:
        """Raise InputError where these are no arguments of the program."""
        flat, structure = pytree.tree_flatten(inputs)
        nodes = self.inputs
        if len(flat) != len(nodes):
            raise InputError(f"the program takes {len(nodes)} input(s), {len(flat)} were given")
        for node, value in zip(nodes, flat, strict=True):
            check_input(node.name, value, node.meta["val"], self.dynamic_batch)
        expected = pytree.tree_structure(self.example_inputs)
        if structure != expected:
            raise InputError(f"the inputs must be nested as {expected}, not as {structure}")
        if self.dynamic_batch is not None and len({value.shape[0] for value in flat}) > 1:
            sizes = ", ".join(f"{n.name} {v.shape[0]}" for n, v in zip(nodes, flat, strict=True))
            raise InputError(f"all inputs must have one batch size, not {sizes}")

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The parameter or buffer that a ``get_attr`` node reads."""
        return attribute(self.graph_module, str(node.target))

    @property
    def training(self) -> bool:
        """True in training mode."""
        return self.graph_module.training

    def train(self, mode: bool = True) -> Program:
        """Put batch norm, dropout and their like into training mode, in place, as ``nn.Module.train`` does; returns itself.

        Running statistics are then updated by every call. Only this program is switched: those that passes made of it, or
        that it was made of, have graphs of their own (and share its tensors; ``copy()`` does not). A norm without running
        statistics uses its batch in both modes.
        """
        self.graph_module.train(mode)
        return self

    def eval(self) -> Program:
        """Put the program into evaluation mode, in place; returns itself. A program is compiled in this mode."""
        return self.train(False)

    def clone(self) -> Program:
        """The same program, in the same mode, on a graph of its own; tensors are shared."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies its own pytree specs so
            graph = copy.deepcopy(self.graph)
        module = ProgramModule(self.graph_module, graph, class_name="Program")
        nn.Module.train(module, self.graph_module.training)
        return replace(self, graph_module=module)

    def copy(self) -> Program:
        """The same program with tensors of its own, so that training one leaves the other alone. Ties stay ties."""
        result = self.clone()
        own: dict[int, torch.Tensor] = {}
        for path in {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}:
            tensor = attribute(self.graph_module, path)
            if id(tensor) not in own:
                own[id(tensor)] = _own(tensor)
            owner, _, leaf = path.rpartition(".")
            setattr(result.graph_module.get_submodule(owner), leaf, own[id(tensor)])
        return result

    def with_record(self, record: Record) -> Program:
        return replace(self, history=(*self.history, record))

    def stats(self) -> Stats:
        """Parameters, non-zero parameters, MACs and bytes, in total and for each layer.

        A pruning mask is no parameter: its zeros count as those of the weight.
        """
        seen: dict[str, tuple[int, int, int]] = {}
        layers = []
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            pair = ops.masked(node)
            if pair is not None:
                own = [self._parameter_of(pair[0], seen, pair[1])]
            else:
                own = [self._parameter_of(a, seen) for a in node.all_input_nodes]
            held = [entry for entry in own if entry is not None]
            macs = ops.macs(node)
            if not macs and not held:
                continue
            op = ops.info(node)
            layers.append(
                LayerStats(
                    node=node.name,
                    op=op.name if op else str(node.target),
                    shape=_shape_of(node),
                    parameters=sum(entry[0] for entry in held),
                    nonzero=sum(entry[1] for entry in held),
                    macs=macs,
                    bytes=sum(entry[2] for entry in held),
                )
            )
        totals = [sum(column) for column in zip(*seen.values(), strict=True)] or [0, 0, 0]
        return Stats(
            totals[0], totals[1], sum(layer.macs for layer in layers), totals[2], tuple(layers)
        )

    def _parameter_of(
        self, node: fx.Node, seen: dict[str, tuple[int, int, int]], mask: fx.Node | None = None
    ) -> tuple[int, int, int] | None:
        if node.op != "get_attr":
            return None
        name = str(node.target)
        if name not in seen:
            tensor = self.tensor(node)
            effective = tensor.detach() if mask is None else tensor.detach() * self.tensor(mask)
            nonzero = int(torch.count_nonzero(effective))
            seen[name] = (tensor.numel(), nonzero, tensor.numel() * tensor.element_size())
        return seen[name]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(ops._hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def attribute(module: nn.Module, target: str) -> torch.Tensor:
    """The tensor at a dotted path, as ``get_attr`` reads it."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def check_input(
    name: str, value: Any, expected: torch.Tensor, batch_range: tuple[int, int] | None
) -> None:
    """Raise InputError where ``value`` does not fit ``expected`` (a fake tensor)."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input {name!r} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype != expected.dtype:
        raise InputError(f"input {name!r} must be {expected.dtype}, not {value.dtype}")
    if value.dim() != expected.dim():
        raise InputError(f"input {name!r} must have {expected.dim()} dimensions, not {value.dim()}")
    for axis, (have, want) in enumerate(zip(value.shape, expected.shape, strict=True)):
        if isinstance(want, torch.SymInt):
            low, high = batch_range or (1, have)
            if not low <= have <= high:
                raise InputError(f"input {name!r} must have a batch of {low} to {high}, not {have}")
        elif have != want:
            raise InputError(
                f"input {name!r} must have size {int(want)} in dimension {axis}, not {have}"
            )
