"""The walk that turns a fake-quantized graph into an integer one.

A float node is *quantized* where an integer twin and ``QParams`` with ``node = dequantize(twin)`` are known: every
fake-quantize, and every copy, max pool or clamp of a quantized node. ``_quantize_as(node, y)`` builds the integers that
``node`` quantizes to at the parameters ``y``, from the integer form of its operator where there is one, else as
``graphopt::quantize`` of the float value. Float readers of a quantized node read ``dequantize`` of its twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.integerize import bounds, copies, layers, pools
from graphopt.backends.integerize.constants import Constants
from graphopt.backends.integerize.emitter import Emitter, Place, Quantized
from graphopt.backends.integerize.quantizers import activation, is_fake_quantize
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.integer.arithmetic import QParams

aten = torch.ops.aten

_ENDS = (*layers.NAMES, *pools.AVERAGES)  # their results can be read as floats
_MERGED = ("add", "concat")
_QUANTIZABLE = (*layers.NAMES, "pad")  # beside those that the op table says so of
_NOT_LAYERS = ("shape", "fake_quantize", "dropout")
_NO_PAD = (0, 0, 0, 0)


class Lowering:
    """One run over one program. ``keep_float`` and ``kept`` (with reasons) hold names of nodes that get no integer form."""

    def __init__(self, edit: Edit, keep_float: frozenset[str], kept: Mapping[str, str]) -> None:
        self._edit = edit
        self._keep_float = keep_float
        self._kept = kept
        self._constants = Constants(edit.program)
        self._emit = Emitter(edit, self._constants)
        self._quantized: dict[fx.Node, Quantized] = {}
        self._reasons: dict[fx.Node, str] = {}

    def run(self) -> None:
        """Build integer twins front to back, then the layers and averages that end in float, then the borders."""
        copies.hoist_sizes(self._edit.graph)
        self._merge_equal_quantizers()
        for node in self._edit.nodes():
            self._visit(node)
        for node in self._live_nodes():
            if ops.is_op(node, *_ENDS):
                self._end_in_float(node)
        self._record_declines()
        for node in self._edit.nodes():
            self._put_border(node)

    # --- the walk ------------------------------------------------------------------------------------------------

    def _merge_equal_quantizers(self) -> None:
        """One fake-quantize for the readers of one value at equal parameters, so that its producer has one reader."""
        seen: dict[tuple[Any, ...], fx.Node] = {}
        for node in self._edit.nodes():
            if not is_fake_quantize(node):
                continue
            first = seen.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if first is not node:
                node.replace_all_uses_with(first)
                self._edit.graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        try:
            twin = self._fake_quantized(node) if is_fake_quantize(node) else self._moved(node)
        except Decline as reason:
            self._reasons[node] = str(reason)
            return
        if twin is not None:
            self._quantized[node] = twin

    def _fake_quantized(self, node: fx.Node) -> Quantized | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if self._constants.value(node) is not None and not _is_merged(node):
            return None
        if x.meta["val"].dtype != torch.float32:
            raise Decline(f"a fake-quantized {x.meta['val'].dtype} tensor has no integer form")
        return self._quantize_as(x, activation(node, self._constants), Place(node, (node,)))

    def _moved(self, node: fx.Node) -> Quantized | None:
        """The twin of an operator that keeps its quantized input's scale and zero point."""
        place = Place(node, (node,))
        x = self._first_input(node)
        if x is not None and copies.source(node) is not None:
            return replace(x, node=self._emit.copy(node, x.node, place))
        if x is None or self._is_kept(node):
            return None
        limits = bounds.of(node)
        if limits is not None and bounds.is_exact(x.qparams, *limits):
            return self._emit.requantize(x, bounds.narrow(x.qparams, *limits), place)
        if ops.is_op(node, "max_pool2d"):
            return replace(x, node=self._emit.max_pool(node, x.node, place))
        if ops.is_op(node, "pad"):
            return self._padded(node, x)
        if ops.is_op(node, "concat"):
            return self._concatenated(node)
        return None

    def _first_input(self, node: fx.Node) -> Quantized | None:
        """The twin of a call's first activation."""
        source = copies.source(node)
        inputs = [source] if source is not None else ops.activations(node)
        return self._quantized.get(inputs[0]) if inputs else None

    def _padded(self, node: fx.Node, x: Quantized) -> Quantized | None:
        arguments = ops.bind(node)
        value = float(arguments.get("value") or 0.0)
        byte = replace(x.qparams, qmin=0, qmax=255)
        if arguments.get("mode", "constant") != "constant" or not bounds.is_exact(
            byte, value, value
        ):
            return None
        fill = byte.quantize(value)
        build = self._emit.build(Place(node, (node,)))
        padded = build.call(aten.constant_pad_nd.default, x.node, arguments["pad"], fill)
        low, high = min(x.qparams.qmin, fill), max(x.qparams.qmax, fill)
        return Quantized(padded, replace(x.qparams, qmin=low, qmax=high))

    def _concatenated(self, node: fx.Node) -> Quantized | None:
        inputs = [self._quantized.get(value) for value in ops.activations(node)]
        found = [x for x in inputs if x is not None]
        if len(found) < len(inputs) or len({x.grid for x in found}) != 1:
            return None
        joined = self._emit.concat(node, [x.node for x in found], Place(node, (node,)))
        low = min(x.qparams.qmin for x in found)
        high = max(x.qparams.qmax for x in found)
        return Quantized(joined, replace(found[0].qparams, qmin=low, qmax=high))

    # --- integers of a float value -------------------------------------------------------------------------------

    def _quantize_as(self, node: fx.Node, y: QParams, place: Place) -> Quantized:
        """The integers that ``node`` quantizes to, within ``y``'s range.

        ``place.origins`` are the nodes between ``node`` and the fake-quantize. A node that others read as well is not
        taken apart: its float value is needed anyway.
        """
        outer, place = place, place.after(node)
        is_sole = len(node.users) == 1 and not self._is_kept(node)
        limits = bounds.of(node) if is_sole else None
        if limits is not None:
            return self._quantize_as(ops.activations(node)[0], bounds.narrow(y, *limits), place)
        if is_sole and ops.is_op(node, "concat") and self._joins_integers(node):
            parts = {x: self._quantize_as(x, y, place).node for x in ops.activations(node)}
            inputs = [parts[x] for x in ops.activations(node)]
            return Quantized(self._emit.concat(node, inputs, place), y)
        if node in self._quantized:
            return self._emit.requantize(self._quantized[node], y, outer)
        source = copies.source(node) if is_sole else None
        if source is not None and isinstance(source.meta["val"], torch.Tensor):
            x = self._quantize_as(source, y, place)
            return replace(x, node=self._emit.copy(node, x.node, place))
        if is_sole and ops.is_op(node, "max_pool2d") and pools.is_batched(node):
            x = self._quantize_as(ops.activations(node)[0], y, place)
            return replace(x, node=self._emit.max_pool(node, x.node, place))
        computed = self._computed(node, y, place) if is_sole else None
        return Quantized(computed or self._emit.quantize(node, y, outer), y)

    def _joins_integers(self, node: fx.Node) -> bool:
        """True where a concatenation has at least one part in integers: the others are quantized to join it."""
        return any(self._is_near_integers(value) for value in ops.activations(node))

    def _is_near_integers(self, node: fx.Node) -> bool:
        while node not in self._quantized:
            if ops.is_op(node, *layers.NAMES):
                return ops.activations(node)[0] in self._quantized
            passes = bounds.of(node) is not None or ops.is_op(node, "max_pool2d")
            source = ops.activations(node)[0] if passes else copies.source(node)
            if source is None:
                return False
            node = source
        return True

    def _computed(self, node: fx.Node, y: QParams, place: Place) -> fx.Node | None:
        """The operator's integer form with its requantization, or None (and a reason) where it has none here."""
        try:
            if ops.is_op(node, *layers.NAMES):
                return self._layer(node, y, place)
            if ops.is_op(node, "add"):
                return self._emit.add(*self._summands(node), y, place)
            if ops.is_op(node, *pools.AVERAGES):
                return self._emit.average(node, self._input(ops.activations(node)[0]), y, place)
        except Decline as reason:
            self._reasons[node] = str(reason)
        return None

    def _input(self, node: fx.Node) -> Quantized:
        if node not in self._quantized:
            raise Decline("its input is not fake-quantized")
        return self._quantized[node]

    def _summands(self, node: fx.Node) -> tuple[Quantized, Quantized]:
        operands = ops.activations(node)
        if len(operands) != 2 or ops.bind(node)["alpha"] != 1:
            raise Decline("only a plain sum of two tensors has an integer form")
        return self._input(operands[0]), self._input(operands[1])

    def _layer(self, node: fx.Node, y: QParams | None, place: Place) -> fx.Node:
        """An integer layer; zeros padded around its input become its own padding."""
        image = ops.activations(node)[0]
        x = self._input(image)
        amounts = _zero_padding(image) if ops.is_op(node, *layers.CONVOLUTIONS) else None
        if amounts is None:
            return self._emit.layer(node, x, y, place)
        inner = self._input(ops.activations(image)[0])
        return self._emit.layer(node, inner, y, place, amounts)

    # --- float readers -------------------------------------------------------------------------------------------

    def _live_nodes(self) -> list[fx.Node]:
        """The nodes that the outputs depend on, a quantized one standing for its twin; in graph order."""
        live: set[fx.Node] = set()
        waiting = [self._edit.program.output]
        while waiting:
            node = waiting.pop()
            if node in live:
                continue
            live.add(node)
            is_twinned = node in self._quantized
            waiting.extend([self._quantized[node].node] if is_twinned else node.all_input_nodes)
        return [node for node in self._edit.graph.nodes if node in live]

    def _end_in_float(self, node: fx.Node) -> None:
        """A layer or average whose result stays float: integer accumulation, then one product."""
        if self._is_kept(node) or node in self._quantized:
            return
        place = Place(node, (node,))
        try:
            if ops.is_op(node, *layers.NAMES):
                new = self._layer(node, None, place)
            else:
                new = self._emit.average(node, self._input(ops.activations(node)[0]), None, place)
            self._edit.replace(node, new)
        except Decline as reason:
            self._reasons.setdefault(node, str(reason))

    def _put_border(self, node: fx.Node) -> None:
        """Float readers of a quantized value read its dequantized twin, those of a fake-quantized constant a constant."""
        if not node.users or not isinstance(node.meta["val"], torch.Tensor):
            return
        place = Place(node, (node,))
        if node in self._quantized:
            self._edit.replace(node, self._emit.dequantize(self._quantized[node], place))
            return
        value = self._constants.value(node) if is_fake_quantize(node) else None
        if value is not None:
            path = f"{self._constants.source(node) or node.name}_quantized"
            self._edit.replace(node, self._emit.parameter(path, value, place))

    # --- what stays float ----------------------------------------------------------------------------------------

    def _is_kept(self, node: fx.Node) -> bool:
        if node.name in self._kept:
            return True
        names = {node.name, *node.meta.get("provenance", ())}
        return not self._keep_float.isdisjoint(names)

    def _record_declines(self) -> None:
        for node in self._live_nodes():
            if node in self._quantized or not _computes_float(node):
                continue
            if self._constants.value(node) is None:
                self._edit.decline(node, self._reason(node))

    def _reason(self, node: fx.Node) -> str:
        if self._is_kept(node):
            return self._kept.get(node.name, "kept in float on request")
        if node in self._reasons:
            return self._reasons[node]
        op = ops.info(node)
        if op is None or not (op.quantizable or op.name in _QUANTIZABLE):
            return f"{op.name if op is not None else node.target} has no integer form"
        if not any(value in self._quantized for value in ops.activations(node)):
            return "its input is not fake-quantized"
        return "its result is not fake-quantized"


def _is_merged(node: fx.Node) -> bool:
    """True for a constant that meets activations in a sum or concatenation, and so counts as one."""
    return any(ops.is_op(user, *_MERGED) for user in node.users)


def _zero_padding(node: fx.Node) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) where ``node`` pads height and width with zeros, else None."""
    if not ops.is_op(node, "pad"):
        return None
    arguments = ops.bind(node)
    amounts = list(arguments["pad"])
    is_spatial = len(amounts) <= 2 * (node.meta["val"].dim() - 2) and min(amounts, default=0) >= 0
    is_constant = arguments.get("mode", "constant") == "constant"
    if not (is_spatial and is_constant) or float(arguments.get("value") or 0.0) != 0.0:
        return None
    left, right, top, bottom = (*amounts, *_NO_PAD)[:4]
    return top, left, bottom, right


def _computes_float(node: fx.Node) -> bool:
    """True for an operator that computes floats: copies, borders and integer layers do not."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") == "graphopt":
        return False
    op = ops.info(node)
    value = node.meta.get("val")
    computes = op is None or op.kind not in _NOT_LAYERS
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return computes and is_float and copies.source(node) is None
