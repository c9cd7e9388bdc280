"""Calibration: the program runs on real batches, and a pass looks at chosen values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.edit import Edit
from graphopt.errors import CalibrationError
from graphopt.modes import is_training
from graphopt.passes import layer
from graphopt.program import Program, check_input


def watch(
    edit: Edit,
    nodes: Iterable[fx.Node],
    calibration: Iterable[Any] | None,
    see: Callable[[fx.Node, Tensor, Tensor], None],
    label: str = "calibrating",
) -> None:
    """Call ``see(node, input, output)`` for every layer of ``nodes`` on every batch, in the order of execution.

    Raises CalibrationError without data, and for NaN or infinity naming the input or the layer.
    """
    watched = set(nodes)

    def look(run: Run, node: fx.Node, value: Tensor) -> None:
        check_finite(value, node, run.batch)
        if node.op != "placeholder":
            see(node, run.env[ops.bind(node)[_input(node)]], value)

    run_batches(edit, watched, calibration, look, label)


def run_batches(
    edit: Edit,
    watched: set[fx.Node],
    calibration: Iterable[Any] | None,
    look: Callable[[Run, fx.Node, Tensor], None],
    label: str = "calibrating",
) -> None:
    """Run the program batch by batch without gradients; ``look(run, node, value)`` at inputs and watched float values.

    A batch is a tensor or the tuple of the program's inputs. One that is a multiple of the captured batch size is cut
    into pieces of that size. Raises CalibrationError where there is no batch, and for a program in training mode, whose
    values depend on the batch and whose running statistics would move.
    """
    if is_training(edit.program.graph):
        raise CalibrationError(
            f"{edit.pass_name}: calibration runs a program in evaluation mode; call program.eval() before"
        )
    seen = 0
    for inputs in edit.progress(batches(edit.program, calibration, edit.pass_name), label):
        Run(edit.program, watched, look, seen).run(*inputs)
        seen += 1
    if not seen:
        raise CalibrationError(f"{edit.pass_name}: the calibration data holds no batch")


def batches(
    program: Program, calibration: Iterable[Any] | None, name: str
) -> Iterator[tuple[Any, ...]]:
    """The calibration batches as tuples of the program's arguments. Raises CalibrationError where there is no data."""
    if calibration is None:
        raise CalibrationError(
            f"{name} needs calibration data: pass calibration=batches, an iterable of input batches"
        )
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    for batch in calibration:
        inputs = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        yield from _pieces(program, inputs)


def check_finite(values: Tensor, node: fx.Node, batch: int) -> tuple[float, float]:
    """The smallest and largest element. Raises CalibrationError for NaN and infinity."""
    if not values.numel():
        return 0.0, 0.0
    low, high = (float(end) for end in torch.aminmax(values))
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    what = "NaN" if math.isnan(low) else "infinity"
    if node.op == "placeholder":
        raise CalibrationError(
            f"calibration batch {batch} holds {what} in input {node.name!r}; check how it is prepared"
        )
    raise CalibrationError(
        f"calibration batch {batch} makes {what} in the output of {layer.describe(node)}; "
        "check the weights before it and the scale of the calibration data"
    )


class Run(fx.Interpreter):
    """Runs one batch; each value is freed after its last reader, and what follows the last watched one is not run."""

    def __init__(
        self,
        program: Program,
        watched: set[fx.Node],
        look: Callable[[Run, fx.Node, Tensor], None],
        batch: int,
    ) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # our errors name the node themselves
        self.batch = batch
        self._watched = watched
        self._look = look
        self._left = sum(1 for node in program.graph.nodes if node in watched)

    def run(self, *args: Any) -> None:  # type: ignore[override]
        with torch.no_grad():
            super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        if not self._left and n.op == "call_function":
            return None
        value = super().run_node(n)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if floating and value.numel() and (n in self._watched or n.op == "placeholder"):
            self._look(self, n, value)
        self._left -= n in self._watched
        return value


class RowSample:
    """A uniform sample of at most ``limit`` of all rows offered, for least squares in bounded memory.

    Each row draws a random key and the ``limit`` largest keys stay. ``add`` is given how many rows there are and a
    function that makes the chosen ones (tensors of equal length, as inputs and outputs of a layer), so that rows which
    do not enter are never made.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit = limit
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: tuple[Tensor, ...] = ()

    def add(self, count: int, take: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Offer ``count`` rows; ``take(indices)`` returns those at ``indices``, in their order."""
        keys = torch.rand(count, generator=self._generator, dtype=torch.float64)
        held = len(self._keys)
        both = torch.cat([self._keys, keys])
        best = both.topk(min(self.limit, len(both))).indices.sort().values
        stay, enter = best[best < held], best[best >= held] - held
        self.seen += count
        if not len(enter):
            return
        new = take(enter)
        old = [rows[stay] for rows in self._rows] or [rows[:0] for rows in new]
        self._rows = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
        self._keys = both[best]

    def rows(self) -> tuple[Tensor, ...]:
        """What ``take`` returned, for the rows that stayed."""
        return self._rows


def _input(node: fx.Node) -> str:
    op = ops.info(node)
    return op.inputs[0] if op is not None else next(iter(ops.bind(node)))


def _pieces(program: Program, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    leaves = pytree.tree_leaves(inputs)
    nodes = program.inputs
    size = _captured_batch(program)
    given = {v.shape[0] for v in leaves if isinstance(v, Tensor) and v.dim()}
    count = given.pop() if len(given) == 1 else 0
    if size and count > size and (count % size == 0 or program.dynamic_batch):
        for start in range(0, count, size):
            yield from _pieces(program, _rows(inputs, slice(start, start + size)))
        return
    if len(leaves) != len(nodes):
        raise CalibrationError(
            f"a calibration batch holds {len(leaves)} tensor(s); the program takes {len(nodes)}"
        )
    for node, value in zip(nodes, leaves, strict=True):
        check_input(node.name, value, node.meta["val"], program.dynamic_batch)
    yield inputs


def _rows(inputs: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    return tuple(pytree.tree_map_only(Tensor, lambda value: value[rows], inputs))


def _captured_batch(program: Program) -> int:
    """The largest batch that the program takes; 0 where its inputs do not agree on one."""
    if program.dynamic_batch is not None:
        return program.dynamic_batch[1]
    sizes = {int(n.meta["val"].shape[0]) if n.meta["val"].dim() else 0 for n in program.inputs}
    return sizes.pop() if len(sizes) == 1 else 0
