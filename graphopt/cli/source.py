"""From the options of ``compress`` and ``compile`` to a program with its passes applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli import data, recipes
from graphopt.cli.console import LAYER_COLUMNS, layer_rows, print_table, step
from graphopt.cli.images import Normalization
from graphopt.cli.options import parse_channels, parse_range

if TYPE_CHECKING:
    from graphopt.program import Program, Record


@dataclass(frozen=True)
class Source:
    """What the user named: a model, its inputs, the passes and the data they calibrate on."""

    model: str
    weights: Path | None
    shapes: Sequence[str]
    dynamic_batch: str | None
    recipe: Path | None
    passes: Sequence[str]
    calibration: str | None
    mean: str
    deviation: str
    trust: bool
    data: str | None = None

    def program(self) -> Program:
        """Captured and compressed. Raises the GraphoptError of whatever fails first."""
        from graphopt import models

        normalization = Normalization(
            parse_channels("--image-mean", self.mean),
            parse_channels("--image-std", self.deviation),
        )
        batch = parse_range(self.dynamic_batch)
        specs = [models.InputSpec.parse(text) for text in self.shapes]
        with step(f"capturing {self.model}"):
            program = models.read_program(
                self.model,
                specs,
                weights=str(self.weights) if self.weights else None,
                dynamic_batch=batch,
                trust=self.trust,
            )
        given: dict[str, Callable[[], Any]] = {}
        captured, calibration, labelled = program, self.calibration, self.data
        if calibration:
            given["calibration"] = lambda: data.calibration(calibration, captured, normalization)
        if labelled:
            given["data"] = lambda: data.labelled(labelled, captured)
        pipeline = recipes.pipeline(self.recipe, self.passes, given, captured)
        for pass_ in pipeline:
            with step(pass_.name):
                program = pass_(program)
        return program


def print_history(history: Sequence[Record], explain: bool) -> None:
    """A row a pass; with ``explain``, a row for each layer that a pass changed and each place where it declined."""
    columns = ("pass", "contract", "rewrites", "declined", "parameters", "MACs", "error")
    rows = [
        (
            record.name,
            record.contract,
            record.rewrites,
            len(record.declines),
            record.parameters[1],
            record.macs[1],
            record.error,
        )
        for record in history
    ]
    print_table("passes", columns, rows)
    declines = [
        (record.name, node, reason) for record in history for node, reason in record.declines
    ]
    notes = [(record.name, note) for record in history for note in record.notes]
    layers = layer_rows([record.to_json() for record in history])
    if explain:
        print_table("layers", LAYER_COLUMNS, layers)
        print_table("declined", ("pass", "node", "reason"), declines)
        print_table("notes", ("pass", "note"), notes)
        return
    if layers:
        print(f"{len(layers)} layer(s) changed; --explain lists them")
    if declines:
        print(f"{len(declines)} place(s) declined; --explain says why")
