"""The float program runs on calibration data and observers watch chosen values; nothing but observers is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from graphopt.edit import Edit
from graphopt.passes.calibration import Run, check_finite, run_batches
from graphopt.passes.quantize.observers import Observer


def observe(
    edit: Edit, observers: Mapping[fx.Node, Observer], calibration: Iterable[Any] | None
) -> None:
    """Show every value in ``observers`` to its observer, batch by batch.

    Raises CalibrationError without data, and for NaN or infinity naming the tensor and layer.
    """

    def look(run: Run, node: fx.Node, value: Tensor) -> None:
        low, high = check_finite(value, node, run.batch)
        if node in observers:
            observers[node].update(value, low, high)

    run_batches(edit, set(observers), calibration, look)
