"""Which values are held as integers: convolutions and linear layers start regions, other operators join them.

Two conditions settle who joins, found as the greatest fixed point. *Supported*: every input is made by an integer
operator or is quantized anyway. *Demanded*: an integer operator reads the result. So a pooling or an add between float
operators stays float, and so does whatever stands between the last layer and the output. One operator needs no demand:
an average over the whole map ends a region, its integer sum read as floats, where an integer operator makes the map and
no float operator needs the map itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.passes.quantize.spec import CLAMPS, SAME_QPARAMS, SEEDS, QuantizationSpec

_FUSES_A_CLAMP = (*SEEDS, "add")


def is_fake_quantize(node: Any) -> bool:
    op = ops.info(node)
    return op is not None and op.kind == "fake_quantize"


def is_constant(value: Any) -> bool:
    """True for a parameter, or an expression of parameters alone (a pruning mask, a codebook)."""
    if not isinstance(value, fx.Node) or value.op in ("placeholder", "output"):
        return False
    return value.op == "get_attr" or all(is_constant(a) for a in value.all_input_nodes)


class Regions:
    """The decision for one program: ``active`` operators compute on integers, ``declined`` says why others do not."""

    def __init__(self, nodes: Iterable[fx.Node], spec: QuantizationSpec) -> None:
        self.spec = spec
        self.declined: dict[fx.Node, str] = {}
        self.nodes = list(nodes)
        self.fused: dict[fx.Node, fx.Node] = {}  # a clamp -> the operator whose epilogue it is
        self.seeds = {node: None for node in self.nodes if self._is_seed(node)}
        self.active = {**self.seeds, **{n: None for n in self.nodes if self._may_join(n)}}
        for node in list(self.active):
            self._fuse(node)
        self._settle()

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The values that an active operator reads as integers."""
        if node.target is operator.getitem:
            return [node.args[0]]  # type: ignore[list-item]
        return ops.activations(node)

    def output(self, node: fx.Node) -> fx.Node:
        """The value that an operator makes: its fused clamp's, where it has one."""
        user = next(iter(node.users), None)
        return user if user is not None and self.fused.get(user) is node else node

    def maker(self, value: fx.Node) -> fx.Node:
        """The operator whose output a value is."""
        return self.fused.get(value, value)

    def is_integer(self, value: fx.Node) -> bool:
        """True where an active operator makes the value."""
        return self.maker(value) in self.active

    def moves(self, node: fx.Node) -> bool:
        """True for an operator whose output lies on its input's grid."""
        if node.target is operator.getitem:
            return True
        op = ops.info(node)
        return op is not None and (op.name in SAME_QPARAMS or _is_whole(node))

    def shares(self, node: fx.Node) -> bool:
        """True for an operator whose output has its inputs' parameters."""
        op = ops.info(node)
        return self.moves(node) or (op is not None and op.name in self.spec.shared)

    def readers(self, value: fx.Node) -> Iterator[fx.Node]:
        """The active operators that read a value as integers."""
        return (user for user in value.users if user in self.active and value in self.inputs(user))

    def _is_seed(self, node: fx.Node) -> bool:
        op = ops.info(node)
        if op is None or op.name not in SEEDS or op.name not in self.spec.ops:
            return False
        arguments = ops.bind(node)
        weight = arguments["weight"]
        if is_fake_quantize(weight):
            return self._decline(node, "already fake-quantized")
        if self.spec.excludes(node):
            return self._decline(node, "excluded by the spec")
        if not is_constant(weight):
            return self._decline(node, "the weight is computed from the input")
        if arguments["bias"] is not None and not is_constant(arguments["bias"]):
            return self._decline(node, "the bias is computed from the input")
        dtype = node.meta["val"].dtype
        if dtype != torch.float32:
            return self._decline(node, f"computes in {str(dtype).removeprefix('torch.')}")
        if is_constant(arguments["input"]):
            return self._decline(node, "the input is constant")
        return True

    def _may_join(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return isinstance(node.args[0], fx.Node) and ops.is_op(node.args[0], "split", "chunk")
        op = ops.info(node)
        if op is None or op.name in SEEDS or op.name not in self.spec.ops:
            return False
        reason = _unfit(node, op)
        if reason is None and any(is_constant(v) for v in ops.activations(node)):
            reason = "an input is constant"
        if reason is None and op.name == "concat" and any(map(is_fake_quantize, self.inputs(node))):
            reason = "an input is already fake-quantized with parameters of its own"
        if reason is not None:
            return self._decline(node, reason)
        if self.spec.excludes(node):
            return self._decline(node, "excluded by the spec")
        return True

    def _decline(self, node: fx.Node, reason: str) -> bool:
        self.declined[node] = reason
        return False

    def _fuse(self, node: fx.Node) -> None:
        """Let a clamp that alone reads ``node`` be its epilogue."""
        if not ops.is_op(node, *_FUSES_A_CLAMP) or len(node.users) != 1:
            return
        user = next(iter(node.users))
        if user in self.active and ops.is_op(user, *CLAMPS):
            del self.active[user]
            self.fused[user] = node

    def _settle(self) -> None:
        changed = True
        while changed:
            idle = [n for n in self.active if n not in self.seeds and not self._holds(n)]
            changed = bool(idle)
            for node in idle:
                del self.active[node]

    def _holds(self, node: fx.Node) -> bool:
        output = self.output(node)
        if not self._is_demanded(node):
            return self._ends(node)
        inputs = self.inputs(node)
        if any(v not in self.active for v in inputs if not isinstance(v.meta["val"], torch.Tensor)):
            return False
        if all(self._is_supported(v) for v in inputs):
            return True
        return self.moves(node) and all(user in self.active for user in output.users)

    def _is_demanded(self, node: fx.Node) -> bool:
        return any(True for _ in self.readers(self.output(node)))

    def _ends(self, node: fx.Node) -> bool:
        """True for an average over the whole map whose map is quantized anyway, or read by averages alone.

        The map of a gate ``y * sigmoid(mean(y))`` is neither: its product in float would read 8-bit noise after one more
        pass (1.1x the squared error at 1.04x the time, 64 channels of 56 x 56).
        """
        if not _is_global_average(node) or self.moves(node):
            return False
        (value,) = self.inputs(node)
        if not self.is_integer(value):
            return False
        others = [user for user in value.users if not _is_global_average(user)]
        read = set(self.readers(value))
        return not others or any(user in read for user in others)

    def _is_supported(self, value: fx.Node) -> bool:
        if self.is_integer(value) or is_fake_quantize(value):
            return True
        return any(reader in self.seeds for reader in self.readers(value))


def _unfit(node: fx.Node, op: ops.Op) -> str | None:
    """Why a call of a quantizable operator has no integer form, or None."""
    arguments = ops.bind(node)
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        return f"computes in {str(value.dtype).removeprefix('torch.')}"
    is_sum = isinstance(arguments.get("other"), fx.Node) and arguments.get("alpha") == 1
    if op.name == "add" and not is_sum:
        return "adds a number or scales an operand"
    if op.kind == "pool" and value.dim() != 4:
        return "its input is not [N, C, H, W]"
    if op.name == "adaptive_avg_pool2d" and not _is_even(arguments):
        return "its windows differ in size"
    if op.name == "mean" and not _is_spatial(arguments, value):
        return "only the mean over height and width has an integer form"
    if op.name == "pad" and (arguments.get("mode", "constant") != "constant" or arguments["value"]):
        return "pads with something other than 0"
    if op.name in CLAMPS and any(
        isinstance(bound, fx.Node) for bound in list(arguments.values())[1:]
    ):
        return "a bound is computed"
    return None


def _is_even(arguments: dict[str, Any]) -> bool:
    """True where an adaptive pool's windows are all of one size."""
    sizes = zip(arguments["self"].meta["val"].shape[2:], arguments["output_size"], strict=True)
    return all(have % want == 0 for have, want in sizes)


def _is_whole(node: fx.Node) -> bool:
    """True for an adaptive pool that returns its input."""
    if not ops.is_op(node, "adaptive_avg_pool2d"):
        return False
    arguments = ops.bind(node)
    return list(arguments["self"].meta["val"].shape[2:]) == list(arguments["output_size"])


def _is_global_average(node: fx.Node) -> bool:
    if ops.is_op(node, "adaptive_avg_pool2d"):
        return list(ops.bind(node)["output_size"]) == [1, 1]
    return ops.is_op(node, "mean") and _is_spatial(ops.bind(node), node.meta["val"])


def _is_spatial(arguments: dict[str, Any], value: torch.Tensor) -> bool:
    rank = arguments["self"].meta["val"].dim()
    dims = sorted(d % rank for d in arguments["dim"] or ())
    return rank == 4 and dims == [2, 3]
