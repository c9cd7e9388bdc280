"""Calibration: the program runs on real batches and observers watch chosen values; nothing but observers is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.edit import Edit
from graphopt.errors import QuantizeError
from graphopt.passes.quantize import layer
from graphopt.passes.quantize.observers import Observer
from graphopt.program import Program, check_input


def observe(
    edit: Edit, observers: Mapping[fx.Node, Observer], calibration: Iterable[Any] | None
) -> None:
    """Show every value in ``observers`` to its observer, batch by batch.

    A batch is a tensor or the tuple of the program's inputs. One that is a multiple of the captured batch size is cut
    into pieces of that size. Raises QuantizeError without data, and for NaN or infinity naming the tensor and layer.
    """
    seen = 0
    for inputs in edit.progress(batches(edit.program, calibration, edit.pass_name), "calibrating"):
        _Watch(edit.program, observers, seen).run(*inputs)
        seen += 1
    if not seen:
        raise QuantizeError(f"{edit.pass_name}: the calibration data holds no batch")


def batches(
    program: Program, calibration: Iterable[Any] | None, name: str
) -> Iterator[tuple[Any, ...]]:
    """The calibration batches as tuples of the program's arguments. Raises QuantizeError where there is no data."""
    if calibration is None:
        raise QuantizeError(
            f"{name} needs calibration data: pass calibration=batches, an iterable of input batches"
        )
    if isinstance(calibration, torch.Tensor):
        calibration = [calibration]
    for batch in calibration:
        inputs = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        yield from _pieces(program, inputs)


def _pieces(program: Program, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    leaves = pytree.tree_leaves(inputs)
    nodes = program.inputs
    size = _captured_batch(program)
    given = {v.shape[0] for v in leaves if isinstance(v, torch.Tensor) and v.dim()}
    count = given.pop() if len(given) == 1 else 0
    if size and count > size and (count % size == 0 or program.dynamic_batch):
        for start in range(0, count, size):
            yield from _pieces(program, _rows(inputs, slice(start, start + size)))
        return
    if len(leaves) != len(nodes):
        raise QuantizeError(
            f"a calibration batch holds {len(leaves)} tensor(s); the program takes {len(nodes)}"
        )
    for node, value in zip(nodes, leaves, strict=True):
        check_input(node.name, value, node.meta["val"], program.dynamic_batch)
    yield inputs


def _rows(inputs: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    return tuple(pytree.tree_map_only(torch.Tensor, lambda value: value[rows], inputs))


def _captured_batch(program: Program) -> int:
    """The largest batch that the program takes; 0 where its inputs do not agree on one."""
    if program.dynamic_batch is not None:
        return program.dynamic_batch[1]
    sizes = {int(n.meta["val"].shape[0]) if n.meta["val"].dim() else 0 for n in program.inputs}
    return sizes.pop() if len(sizes) == 1 else 0


def bounds(values: torch.Tensor, node: fx.Node, batch: int) -> tuple[float, float]:
    """The smallest and largest element. Raises QuantizeError for NaN and infinity."""
    low, high = (float(end) for end in torch.aminmax(values))
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    what = "NaN" if math.isnan(low) else "infinity"
    if node.op == "placeholder":
        raise QuantizeError(
            f"calibration batch {batch} holds {what} in input {node.name!r}; check how it is prepared"
        )
    raise QuantizeError(
        f"calibration batch {batch} makes {what} in the output of {layer.describe(node)}; "
        "check the weights before it and the scale of the calibration data"
    )


class _Watch(fx.Interpreter):
    """Runs one batch; each value is freed after its last reader, and what follows the last observed one is not run."""

    def __init__(self, program: Program, observers: Mapping[fx.Node, Observer], batch: int) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # our errors name the node themselves
        self._observers = observers
        self._left = sum(1 for node in program.graph.nodes if node in observers)
        self._batch = batch

    def run(self, *args: Any) -> None:  # type: ignore[override]
        with torch.no_grad():
            super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        if not self._left and n.op == "call_function":
            return None
        value = super().run_node(n)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if floating and value.numel() and (n in self._observers or n.op == "placeholder"):
            low, high = bounds(value, n, self._batch)
            if n in self._observers:
                self._observers[n].update(value, low, high)
        self._left -= n in self._observers
        return value
