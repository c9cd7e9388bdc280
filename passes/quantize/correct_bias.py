"""Correct biases for the mean error of quantization: ``b' = b + E[conv(x, w) - conv(fq(x), fq(w))]``, by channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.errors import CalibrationError
from graphopt.passes import layer
from graphopt.passes.calibration import batches
from graphopt.passes.quantize.regions import is_fake_quantize
from graphopt.passes.quantize.spec import SEEDS
from graphopt.passes.quantize.weights import constant_value
from graphopt.passing import Pass
from graphopt.program import Program
from graphopt.registry import register

_CORRECTED = "_corrected"
_CARRIERS = ("shape", "pool", "pad", "concat")  # what may stand between a fake-quantize and a layer


@dataclass
class _Mean:
    """A running mean over positions, float64 by channel."""

    total: Tensor | float = 0.0
    count: int = 0

    def update(self, gap: Tensor, axis: int) -> None:
        rows = gap.movedim(axis, -1).reshape(-1, gap.shape[axis])
        self.total = self.total + rows.sum(dim=0, dtype=torch.float64)
        self.count += rows.shape[0]

    @property
    def value(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count


@register
@dataclass(frozen=True)
class CorrectBias(Pass):
    """``conv(fq(x), fq(w), b) -> conv(fq(x), fq(w), b + E[conv(x, w) - conv(fq(x), fq(w))])`` (Nagel et al. 2019, 4.2).

    The mean over ``calibration`` is empirical, by output channel and for each layer on its own: x is what the float
    program computes, so that the layers' corrections do not count one error twice. Declines layers whose weight is not
    fake-quantized, whose bias is computed, and layers that were corrected before.

    Raises CalibrationError without calibration data and where a correction is not finite.
    """

    name: ClassVar[str] = "correct-bias"
    contract: ClassVar[Contract] = lossy
    runs_after: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "quantize")

    calibration: Iterable[Any] | None = field(default=None, repr=False)

    def apply(self, edit: Edit) -> None:
        means = {node: _Mean() for node in edit.nodes(*SEEDS) if _applies(edit, node)}
        if not means:
            edit.note("no fake-quantized layer to correct")
            return
        data = batches(edit.program, self.calibration, edit.pass_name)
        for inputs in edit.progress(data, "measuring"):
            with torch.no_grad():
                _Twice(edit.program, means).run(*inputs)
        for node, mean in means.items():
            if not mean.count:
                raise CalibrationError(f"{edit.pass_name}: the calibration data holds no batch")
            _correct(edit, node, mean.value)


class _Twice(fx.Interpreter):
    """Runs the program in float, and each layer in ``means`` once more on fake-quantized operands."""

    def __init__(self, program: Program, means: Mapping[fx.Node, _Mean]) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self._means = means
        self._quantized: dict[fx.Node, Any] = {}
        self._readers = {node: len(node.users) for node in program.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        if is_fake_quantize(n):
            self._quantized[n] = super().run_node(n)
            value = self.env[n.all_input_nodes[0]]
        else:
            value = super().run_node(n)
            if n in self._means:
                axis = 1 if not ops.is_op(n, "linear") else -1
                self._means[n].update(value - self._on_quantized(n), axis)
            elif self._carries(n):
                self._quantized[n] = self._on_quantized(n)
        for source in n.all_input_nodes:
            self._readers[source] -= 1
            if not self._readers[source]:
                self._quantized.pop(source, None)
        return value

    def _carries(self, node: fx.Node) -> bool:
        op = ops.info(node)
        moves = node.op == "call_function" and (op is None or op.kind in _CARRIERS)
        return moves and any(source in self._quantized for source in node.all_input_nodes)

    def _on_quantized(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda a: self._quantized.get(a, self.env.get(a))
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _applies(edit: Edit, node: fx.Node) -> bool:
    arguments = ops.bind(node)
    if not is_fake_quantize(arguments["weight"]):
        edit.decline(node, "its weight is not fake-quantized")
        return False
    bias = arguments["bias"]
    if bias is None:
        return True
    if bias.op != "get_attr":
        edit.decline(node, "its bias is computed")
        return False
    # The correction does not depend on the bias: a second one would be added whole.
    if _CORRECTED in str(bias.target):
        edit.decline(node, "its bias is corrected already")
        return False
    return True


def _correct(edit: Edit, node: fx.Node, shift: Tensor) -> None:
    """A layer's corrected bias is a new parameter: another reader of the old one keeps it."""
    if not bool(torch.isfinite(shift).all()):
        raise CalibrationError(
            f"{edit.pass_name}: the correction of {layer.describe(node)} is not finite; "
            "check the calibration data"
        )
    bias = ops.bind(node)["bias"]
    old = 0.0 if bias is None else constant_value(edit, bias).double()
    name = f"{node.name}_bias" if bias is None else str(bias.target)
    dtype = node.meta["val"].dtype
    new = edit.build(node, [node]).parameter(name + _CORRECTED, (old + shift).to(dtype))
    edit.replace_argument(node, "bias", new)
