"""What scores and schedules may look at: the program on calibration inputs, and its loss on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphopt.errors import CalibrationError, PassError
from graphopt.passes.calibration import batches
from graphopt.program import Program
from graphopt.progress import track

Loss = Callable[[Any, Any], Tensor]

LOSSES: dict[str, Loss] = {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}


@dataclass(frozen=True, eq=False)
class Evidence:
    """The program in evaluation mode, on data. ``loss`` is a name of ``LOSSES`` or ``loss(output, labels)``, a mean.

    A program in training mode runs as a copy of its graph: its running statistics are not to be touched.
    """

    source: Program
    name: str
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    data: Iterable[Any] | None = field(default=None, repr=False)
    loss: str | Loss = "cross-entropy"

    program: Program = field(init=False)

    def __post_init__(self) -> None:
        source = self.source
        object.__setattr__(self, "program", source.clone().eval() if source.training else source)

    def inputs(self) -> Iterator[tuple[Any, ...]]:
        """Batches of the program's arguments: ``calibration``, or those of ``data``. Raises CalibrationError."""
        if self.calibration is None and self.data is not None:
            source: Iterator[tuple[Any, ...]] = (inputs for inputs, _ in self.labelled())
        else:
            source = batches(self.program, self.calibration, self.name)
        return self._some(source, "calibration")

    def labelled(self) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """``(arguments, labels)``, cut into the captured batch size where it is fixed. Raises CalibrationError."""
        if self.data is None:
            raise CalibrationError(
                f"{self.name} needs labelled data: pass data=batches, an iterable of (inputs, labels)"
            )
        return self._some(self._pairs(), "labelled")

    def _pairs(self) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        assert self.data is not None
        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise CalibrationError(
                    f"{self.name}: a batch of labelled data must be (inputs, labels), not "
                    f"{type(batch).__name__} of {len(batch) if hasattr(batch, '__len__') else '?'}"
                )
            inputs, labels = batch
            start = 0
            for piece in batches(self.program, [inputs], self.name):
                count = _rows(piece)
                yield piece, labels[start : start + count]
                start += count
            if start != len(labels):
                raise CalibrationError(
                    f"{self.name}: a batch of labelled data holds {start} input(s) and {len(labels)} label(s)"
                )

    def _some(self, source: Iterable[Any], kind: str) -> Iterator[Any]:
        """``source`` with a progress bar. Raises CalibrationError where it is empty."""
        empty = True
        for item in track(source, f"{self.name}: {kind} data"):
            empty = False
            yield item
        if empty:
            raise CalibrationError(f"{self.name}: the {kind} data holds no batch")

    def run(
        self,
        inputs: tuple[Any, ...],
        values: Mapping[fx.Node, Tensor] | None = None,
        look: Callable[[fx.Node, Any], None] | None = None,
    ) -> Any:
        """The output, with ``values`` in place of what some nodes compute; ``look(node, value)`` sees every call's value."""
        return _Run(self.program, values or {}, look).run(*inputs)

    def loss_of(self, output: Any, labels: Tensor) -> Tensor:
        """The loss; a named one is that of the first output. Raises PassError for one that is no finite scalar."""
        try:
            if isinstance(self.loss, str):
                value = LOSSES[self.loss](first_output(output), labels)
            else:
                value = self.loss(output, labels)
        except Exception as error:
            outputs = [list(y.shape) for y in pytree.tree_leaves(output) if isinstance(y, Tensor)]
            raise PassError(
                f"{self.name}: the loss fails on outputs of shape {outputs} and labels of shape "
                f"{list(labels.shape)}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PassError(
                f"{self.name}: the loss must return one number, its mean over the batch"
            )
        if not bool(torch.isfinite(value)):
            raise PassError(
                f"{self.name}: the loss on the labelled data is {float(value.detach())}"
            )
        return value


def first_output(output: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _rows(inputs: tuple[Any, ...]) -> int:
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((int(value.shape[0]) for value in tensors if value.dim()), 1)


class _Run(fx.Interpreter):
    """Runs the graph; nodes of the same name as those in ``values`` have the given value."""

    def __init__(
        self,
        program: Program,
        values: Mapping[fx.Node, Tensor],
        look: Callable[[fx.Node, Any], None] | None,
    ) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self._values = {node.name: value for node, value in values.items()}
        self._look = look

    def run_node(self, n: fx.Node) -> Any:
        value = self._values[n.name] if n.name in self._values else super().run_node(n)
        if self._look is not None and n.op == "call_function":
            self._look(n, value)
        return value
