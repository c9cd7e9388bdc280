"""``Emitter``: makes the nodes of the integer level, one method an operator; equal nodes and tensors are made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.backends.integerize import copies, layers, pools
from graphopt.backends.integerize.constants import Constants
from graphopt.edit import Build, Edit
from graphopt.errors import Decline, IntegerizeError
from graphopt.integer.arithmetic import FixedPointAdd, QParams

integer_ops = torch.ops.graphopt
aten = torch.ops.aten

FLOAT_LAYER = "float_layer"  # in the metadata of an integer layer


@dataclass(frozen=True)
class Quantized:
    """``float value = dequantize(node)`` at these parameters; their range is what the integers can take."""

    node: fx.Node
    qparams: QParams

    @property
    def grid(self) -> tuple[float, int]:
        return self.qparams.scale, self.qparams.zero_point


@dataclass(frozen=True)
class Place:
    """Where new nodes stand (before ``anchor``) and whose work they take over (``origins``)."""

    anchor: fx.Node
    origins: tuple[fx.Node, ...]

    def after(self, node: fx.Node) -> Place:
        """The same place for nodes that take over ``node`` as well."""
        return Place(self.anchor, (node, *self.origins))


def _of(layer: fx.Node, made: fx.Node) -> fx.Node:
    """``made``, with the name of the float layer whose integer form it is."""
    made.meta[FLOAT_LAYER] = layer.name
    return made


class Emitter:
    """Every method returns a new node, or an equal one made before."""

    def __init__(self, edit: Edit, constants: Constants) -> None:
        self._edit = edit
        self._constants = constants
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        self._parameters: dict[tuple[str, torch.Size], list[tuple[torch.Tensor, fx.Node]]] = {}

    def build(self, place: Place) -> Build:
        return self._edit.build(place.anchor, place.origins)

    def _once(self, place: Place, target: Any, *arguments: Any) -> fx.Node:
        key = (target, *arguments)
        if key not in self._made:
            self._made[key] = self.build(place).call(target, *arguments)
        return self._made[key]

    def quantize(self, node: fx.Node, y: QParams, place: Place) -> fx.Node:
        """``graphopt::quantize`` of a float value."""
        arguments = (y.scale, y.zero_point, y.qmin, y.qmax)
        return self._once(place, integer_ops.quantize.default, node, *arguments)

    def dequantize(self, x: Quantized, place: Place) -> fx.Node:
        """The float value of ``x``."""
        return self._once(place, integer_ops.dequantize.default, x.node, *x.grid)

    def requantize(self, x: Quantized, y: QParams, place: Place) -> Quantized:
        """``x`` at the scale, zero point and range of ``y``; ``x`` itself where nothing would change."""
        same = x.grid == (y.scale, y.zero_point)
        if same and y.qmin <= x.qparams.qmin and x.qparams.qmax <= y.qmax:
            return x
        multiplier = x.qparams.scale / y.scale
        arguments = (multiplier, x.qparams.zero_point, y.zero_point, y.qmin, y.qmax)
        target = integer_ops.requantize.default
        return Quantized(self._once(place, target, x.node, *arguments), y)

    def copy(self, node: fx.Node, x: fx.Node, place: Place) -> fx.Node:
        """The copy that ``node`` is, of the integers ``x``."""
        if copies.is_identity(node):
            return x
        target, args, kwargs = copies.call(node, x)
        return self.build(place).call(target, *args, **kwargs)

    def max_pool(self, node: fx.Node, x: fx.Node, place: Place) -> fx.Node:
        """``graphopt::max_pool2d``."""
        call = pools.maximum(node)
        return self.build(place).call(call.target, x, *call.arguments)

    def average(self, node: fx.Node, x: Quantized, y: QParams | None, place: Place) -> fx.Node:
        """``graphopt::avg_pool2d`` or ``global_avg_pool``, as float without ``y``; declines as ``pools.average``."""
        call = pools.average(node, x.qparams, y)
        return self.build(place).call(call.target, x.node, *call.arguments)

    def concat(self, node: fx.Node, inputs: list[fx.Node], place: Place) -> fx.Node:
        """The concatenation that ``node`` is, of integers on one grid."""
        return self.build(place).call(node.target, inputs, *node.args[1:], **node.kwargs)

    def add(self, a: Quantized, b: Quantized, y: QParams, place: Place) -> fx.Node:
        """``graphopt::add``; declines a broadcast and scales too far apart for fixed point."""
        if a.node.meta["val"].shape != b.node.meta["val"].shape:
            raise Decline("a broadcasting sum has no integer form")
        try:
            fixed = FixedPointAdd.of(a.qparams.scale, b.qparams.scale, y.scale)
        except IntegerizeError as error:
            raise Decline(str(error)) from error
        multipliers = (fixed.a_multiplier, fixed.b_multiplier, fixed.shift)
        zero_points = (a.qparams.zero_point, b.qparams.zero_point, y.zero_point)
        return self.build(place).call(
            integer_ops.add.default, a.node, b.node, *multipliers, *zero_points, y.qmin, y.qmax
        )

    def layer(
        self,
        node: fx.Node,
        x: Quantized,
        y: QParams | None,
        place: Place,
        pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> fx.Node:
        """A convolution or linear layer of ``x``, requantized to ``y`` or, without one, as float.

        ``pad`` (top, left, bottom, right) zeros around ``x`` join a convolution's own padding. Declines as ``layers.read``.
        """
        layer = layers.read(node, x.qparams, self._constants)
        operands = self._operands(layer, layer.multiplier(x.qparams, y), place)
        ending = () if y is None else (y.zero_point, y.qmin, y.qmax)
        arguments = (*operands, x.qparams.zero_point, *ending)
        build = self.build(place)
        if layer.window is None:
            target = integer_ops.linear_dequantize if y is None else integer_ops.linear
            return _of(node, build.call(target.default, x.node, *arguments))
        window = layer.window
        padding = [own + outer for own, outer in zip(window.padding, pad, strict=True)]
        geometry = (list(window.stride), padding, list(window.dilation), window.groups)
        arguments = (*operands, *geometry, x.qparams.zero_point, *ending)
        target = integer_ops.conv2d_dequantize if y is None else integer_ops.conv2d
        if layer.rank == 4:
            return _of(node, build.call(target.default, x.node, *arguments))
        image = build.call(aten.unsqueeze.default, x.node, 2)
        made = _of(node, build.call(target.default, image, *arguments))
        return build.call(aten.squeeze.dim, made, 2)

    def _operands(
        self, layer: layers.Layer, multiplier: torch.Tensor, place: Place
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Weight, bias and multiplier, named after the float weight."""
        path = layer.weight.path
        owner = path.rpartition(".")[0]
        stem = f"{owner}." if owner else ""
        return (
            self.parameter(f"{path}_int8", layer.weight.q, place),
            self.parameter(f"{stem}bias_int32", layer.bias, place),
            self.parameter(f"{stem}multiplier", multiplier, place),
        )

    def parameter(self, name: str, tensor: torch.Tensor, place: Place) -> fx.Node:
        """A buffer; layers that share a tensor share its integers."""
        known = self._parameters.setdefault((name, tensor.shape), [])
        for held, node in known:
            if held.dtype == tensor.dtype and torch.equal(held, tensor):
                return node
        node = self.build(place).parameter(name, tensor, trainable=False)
        known.append((tensor, node))
        return node
