"""What tuning found: a row a distinct layer, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TunedLayer:
    """A distinct convolution or linear layer; seconds of one call. ``ratio`` is the cost model's time over the tuned one."""

    layers: tuple[str, ...]
    shape: str
    model_choice: str
    tuned_choice: str
    model_seconds: float | None
    tuned_seconds: float | None
    ratio: float
    trials: int


@dataclass(frozen=True)
class TuningReport:
    """``geometric_mean`` is that of the measured layers' ratios; ``complete`` where no candidate is left to measure."""

    target: str
    threads: int
    store: str
    layers: tuple[TunedLayer, ...]
    geometric_mean: float
    complete: bool
    outcomes: Mapping[str, int]
    interrupted: bool = False

    def summary(self) -> dict[str, Any]:
        """What an artifact records: the layers that do not have the cost model's choice."""
        tuned = [layer for layer in self.layers if layer.ratio != 1.0]
        return {
            "geometric_mean": round(self.geometric_mean, 4),
            "layers": [
                {
                    "layers": list(layer.layers),
                    "choice": layer.tuned_choice,
                    "ratio": round(layer.ratio, 4),
                }
                for layer in tuned
            ],
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """``118 trials; ...``: the sum of it."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())
        rest = "every candidate measured" if self.complete else "candidates are left"
        return (
            f"trials: {counts or 'none'}; {rest}; the cost model's choices take "
            f"{self.geometric_mean:.3f} times the tuned time (geometric mean of {self._measured()} layers)"
        )

    def _measured(self) -> int:
        return sum(layer.model_seconds is not None for layer in self.layers)

    def rows(self) -> list[tuple[object, ...]]:
        """For a table under ``COLUMNS``, slowest layer first."""
        ordered = sorted(
            self.layers, key=lambda layer: -(layer.model_seconds or 0.0) * len(layer.layers)
        )
        return [
            (
                _short(layer.layers),
                layer.shape,
                layer.model_choice,
                layer.tuned_choice,
                _microseconds(layer.model_seconds),
                _microseconds(layer.tuned_seconds),
                round(layer.ratio, 3),
                layer.trials,
            )
            for layer in ordered
        ]


COLUMNS = (
    "layer",
    "shape",
    "cost model",
    "tuned",
    "model, us",
    "tuned, us",
    "ratio",
    "trials",
)


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 1)


def _short(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
