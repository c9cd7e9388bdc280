"""``y = f(x)`` becomes ``y = float16(f(float32(x)))`` with ``x`` float16: what is stored, and multiplied, is float16.

Products of float16 are exact in float32, and so are the sums of a convolution between its casts: a layer is
``float16(activation(sum + bias + residual))``, rounded once, as tensor cores and an epilogue in float32 compute it. The program
stays ATen, runs in PyTorch, and has the inputs and outputs it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.backends.cuda.autocast import (
    LARGEST,
    Kind,
    half_behind,
    holds_float32,
    is_added,
    kind_of,
)
from graphopt.backends.lower import convolution, elementwise
from graphopt.backends.lower.convolution import ConvolutionStep
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit, fake_mode, propagate
from graphopt.passing import Pass
from graphopt.program import Program

_CAST = torch.ops.aten.to.dtype


@dataclass(frozen=True)
class CastToFloat16(Pass):
    """Convolutions, linear layers, matrix products and attention multiply float16 and add in float32.

    Norms, softmax, exponentials, logarithms, powers and sums compute in float32 between casts; what has a float32 input
    among them stays float32; all else stores what its inputs are. Biases, statistics and the numbers of norms stay float32,
    and so do results that only leave the network. Integer operators are left alone. Declines a layer whose weights exceed
    float16's range.
    """

    name: ClassVar[str] = "cast-to-float16"
    contract: ClassVar[Contract] = lossy

    measure: bool = True

    def measured(self) -> bool:
        return self.measure

    def apply(self, edit: Edit) -> None:
        _Rewrite(edit).run()


def kept_in_float32(program: Program) -> tuple[tuple[str, str], ...]:
    """``(node, reason)`` of every layer that the last ``CastToFloat16`` left in float32."""
    found = (r.declines for r in reversed(program.history) if r.name == CastToFloat16.name)
    return next(found, ())


@dataclass
class _Facts:
    """What is known of the program before it changes.

    ``stored``: some reader wants float16. ``multiplied``: products alone read it. ``before[node]`` is the value that it takes
    from a kernel's registers, not rounded; ``residuals[layer]`` joins the layer's sum there, at the node beside it.
    """

    kinds: dict[fx.Node, Kind]
    stored: set[fx.Node] = field(default_factory=set)
    multiplied: set[fx.Node] = field(default_factory=set)
    before: dict[fx.Node, fx.Node] = field(default_factory=dict)
    residuals: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)


class _Rewrite:
    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.graph = edit.graph
        self.floats = {node for node in self.graph.nodes if holds_float32(node)}
        self.half: dict[fx.Node, fx.Node] = {}  # a value that is stored in float16, as such
        self.rounded: dict[fx.Node, fx.Node] = {}  # a float16 copy of one that is not
        self.inner: set[fx.Node] = set()  # what could be, and stays in a kernel's registers
        self.widened: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.parameters: dict[str, fx.Node] = {}  # in float16, by their paths
        self.facts = self._survey()
        self.followed = set(self.facts.before.values())
        self.halved = self._halved()

    def run(self) -> None:
        for node in list(self.graph.nodes):
            kind = self.facts.kinds[node]
            if kind is Kind.SOURCE:
                continue
            if kind is Kind.MOVE and node in self.floats:
                self._move(node)
            elif kind is Kind.SIZE:
                self._read(node, lambda value: self.half.get(value, value))
            elif kind is Kind.PRODUCT:
                self._multiply(node)
            else:
                self._compute(node, kind)

    # before anything changes

    def _survey(self) -> _Facts:
        facts = _Facts({node: kind_of(node) for node in self.graph.nodes})
        for node in self.graph.nodes:
            reason = self._reason(node) if facts.kinds[node] is Kind.PRODUCT else None
            if reason is not None:
                self.edit.decline(node, reason)
                facts.kinds[node] = Kind.FLOAT32
            elif facts.kinds[node] is Kind.FOLLOW and not self._all_fit(node):
                facts.kinds[node] = Kind.FLOAT32
        for node in reversed(self.graph.nodes):
            readers = [user for user in node.users if facts.kinds[user] is not Kind.SIZE]
            if any(_stores(facts, node, reader) for reader in readers):
                facts.stored.add(node)
            if readers and all(_multiplies(facts, node, reader) for reader in readers):
                facts.multiplied.add(node)
        for node in self.graph.nodes:
            single = isinstance(node.meta.get("val"), torch.Tensor)
            if node in self.floats and single and node not in facts.before:
                _add_epilogue(facts, node)
        return facts

    def _halved(self) -> dict[str, bool]:
        """By the paths of parameters: whether all that read one multiply it."""
        found: dict[str, bool] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                alike = all(_multiplies(self.facts, node, reader) for reader in node.users)
                found[str(node.target)] = found.get(str(node.target), True) and alike
        return found

    def _reason(self, product: fx.Node) -> str | None:
        """Why a product stays float32."""
        for name, value in _operands(product):
            if value.op != "get_attr" or is_added(product, name):
                continue
            largest = self._largest(value)
            if largest > LARGEST:
                return f"its weights reach {largest:.4g}, and float16 ends at {LARGEST:.0f}"
        return None

    def _largest(self, parameter: fx.Node) -> float:
        tensor = self.edit.program.tensor(parameter).detach()
        finite = tensor[torch.isfinite(tensor)]
        return float(finite.abs().max()) if finite.numel() else 0.0

    # one node at a time

    def _multiply(self, node: fx.Node) -> None:
        if node in self.facts.residuals:  # the kernel reads it: it is made before the layer
            residual, reader = self.facts.residuals[node]
            self.widened[residual, reader] = self._float32(residual, node)
        given = list(_operands(node))
        added = {value for name, value in given if is_added(node, name)}
        forms = {
            value: self._float32(value, node) if value in added else self._rounded(value, node)
            for _, value in given
            if value in self.floats
        }
        self._read(node, lambda value: forms[value])
        self._store(node, node in self.facts.stored)

    def _compute(self, node: fx.Node, kind: Kind) -> None:
        given = [value for value in node.all_input_nodes if value in self.floats]
        native = [value for value in given if self._is_computed(value)]
        from_float32 = any(value not in self.half and value not in self.inner for value in native)
        before = self.facts.before.get(node)
        self._read(
            node,
            lambda value: value if value is before else self._float32(value, node),
        )
        stored = node in self.facts.stored and kind in (Kind.NORM, Kind.FOLLOW)
        if kind is Kind.FOLLOW:
            stored = stored and bool(given) and not from_float32
        multiplied = kind is not Kind.EXACT and node in self.facts.multiplied
        self._store(node, stored or multiplied)

    def _move(self, node: fx.Node) -> None:
        given = [value for value in node.all_input_nodes if value in self.floats]
        in_float32 = any(self._is_computed(value) and value not in self.half for value in given)
        only_sources = not any(value in self.half for value in given)
        fits = self._all_fit(node)
        if in_float32 or not fits or (only_sources and node not in self.facts.stored):
            self._read(node, lambda value: self._float32(value, node))
            self._store(node, node in self.facts.multiplied and fits)
            return
        self._read(node, self._float16)
        node.meta["val"] = propagate(node, fake_mode(self.edit.program))
        self.half[node] = node

    def _is_computed(self, value: fx.Node) -> bool:
        """False for inputs and parameters, which are float32 in memory and whatever their readers take them for."""
        return self.facts.kinds[value] is not Kind.SOURCE

    def _all_fit(self, node: fx.Node) -> bool:
        """False for a reader of a parameter that float16 does not hold: a mask of -3.4e38, say."""
        given = [value for value in node.all_input_nodes if value in self.floats]
        return all(value.op != "get_attr" or self._largest(value) <= LARGEST for value in given)

    def _store(self, node: fx.Node, in_half: bool) -> None:
        """Round the value behind the node, if it is one tensor that leaves its kernel."""
        if in_half and node in self.followed:
            self.inner.add(node)
        elif in_half and isinstance(node.meta["val"], torch.Tensor) and node in self.floats:
            self.half[node] = self._cast(node, torch.float16, node.next)
            self.edit.rewrites += 1

    # values

    def _float32(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        if (value, reader) in self.widened:
            return self.widened[value, reader]
        if value not in self.half:
            return value
        return self._cast(self.half[value], torch.float32, reader)

    def _rounded(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """A float32 that float16 holds: itself where it is one already."""
        if half_behind(value) is not None:
            return value
        return self._cast(self._float16(value), torch.float32, reader)

    def _float16(self, value: fx.Node) -> fx.Node:
        if value not in self.floats:
            return value
        if value in self.half:
            return self.half[value]
        if value not in self.rounded:
            made = self._parameter(value) if value.op == "get_attr" else None
            self.rounded[value] = made or self._cast(value, torch.float16, _behind(value))
            self.edit.rewrites += 1
        return self.rounded[value]

    def _parameter(self, node: fx.Node) -> fx.Node:
        """A weight in float16, under its own name where nothing reads it in float32."""
        path = str(node.target)
        if path not in self.parameters:
            build = self.edit.build(node, [node])
            tensor = self.edit.program.tensor(node)
            rounded = tensor.detach().to(torch.float16)
            if self.halved[path]:
                self.parameters[path] = build.update(node, rounded)
            else:
                trained = isinstance(tensor, torch.nn.Parameter)
                self.parameters[path] = build.parameter(path, rounded, trained)
        return self.parameters[path]

    def _cast(self, value: fx.Node, dtype: torch.dtype, anchor: fx.Node) -> fx.Node:
        return self.edit.build(anchor, [value]).call(_CAST, value, dtype)

    def _read(self, node: fx.Node, form: Any) -> None:
        def replaced(value: fx.Node) -> fx.Node:
            return form(value) if value in self.floats else value

        node.args = fx.map_arg(node.args, replaced)
        node.kwargs = fx.map_arg(node.kwargs, replaced)


def _operands(product: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The tensors of a product by their arguments' names."""
    for name, given in ops.bind(product).items():
        for value in pytree.tree_leaves(given):
            if isinstance(value, fx.Node):
                yield name, value


def _behind(value: fx.Node) -> fx.Node:
    """Where what is made of a value may stand: inputs come first in a graph."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def _stores(facts: _Facts, node: fx.Node, reader: fx.Node) -> bool:
    kind = facts.kinds[reader]
    if kind is Kind.PRODUCT:
        return any(v is node and not is_added(reader, name) for name, v in _operands(reader))
    if kind is Kind.MOVE:
        return reader in facts.stored
    return kind not in (Kind.OUTPUT, Kind.EXACT)


def _multiplies(facts: _Facts, node: fx.Node, reader: fx.Node) -> bool:
    kind = facts.kinds[reader]
    if kind is Kind.PRODUCT:
        return all(v is not node or not is_added(reader, name) for name, v in _operands(reader))
    return kind is Kind.MOVE and reader in facts.multiplied


def _add_epilogue(facts: _Facts, node: fx.Node) -> None:
    """What one kernel does is rounded once, behind its last node: a layer, the sum and the activation that follow it."""
    for select in (convolution.select_float, elementwise.select_float):
        step = select(node)
        if step is None:
            continue
        facts.before.update(zip(step.nodes[1:], step.nodes, strict=False))
        if isinstance(step, ConvolutionStep) and len(step.inputs) > 1:
            facts.residuals[node] = step.inputs[1], step.nodes[1]
        return
