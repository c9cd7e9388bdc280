"""The numbers of the demo: one dataclass for the terminal, the JSON file and the page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

EAGER, FLOAT, INT8 = "PyTorch eager, f32", "graphopt, f32", "graphopt, int8"


@dataclass(frozen=True)
class Slow:
    """One of the slowest kernels of the int8 model."""

    layer: str
    operator: str
    milliseconds: float
    share: float
    gops: float | None
    share_of_peak: float | None


@dataclass(frozen=True)
class Result:
    """Counts are of photos, sizes in bytes, latency in median milliseconds on one thread."""

    network: str
    machine: str
    target: str
    photos: int
    float_correct: int
    int8_correct: int
    crops: int
    agreeing: int
    float_bytes: int
    int8_bytes: int
    latency: dict[str, float]
    slowest: tuple[Slow, ...]
    calibration: int
    seconds: float

    @property
    def agreement(self) -> float:
        return self.agreeing / self.crops

    @property
    def smaller(self) -> float:
        """Float weights over the compiled file."""
        return self.float_bytes / self.int8_bytes

    @property
    def faster(self) -> float:
        """PyTorch eager over int8."""
        return self.latency[EAGER] / self.latency[INT8]

    def to_json(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("agreement", "smaller", "faster")}
        return {**dataclasses.asdict(self), **derived}

    def rows(self) -> list[tuple[str, str]]:
        """Each number with what it is."""
        size = f"{self.float_bytes / 1e6:.2f} MB of float weights, {self.int8_bytes / 1e6:.2f} MB compiled"
        latency = [(f"latency, {name}", f"{value:.2f} ms") for name, value in self.latency.items()]
        return [
            ("network", self.network),
            ("machine", f"{self.machine}, target {self.target}, one thread"),
            ("calibrated on", f"{self.calibration} crops of 7 photos (scikit-image, scikit-learn)"),
            ("float top-1", f"{self.float_correct} of {self.photos} labelled photos (foolbox)"),
            ("int8 top-1", f"{self.int8_correct} of {self.photos}"),
            (
                "int8 agrees with float",
                f"{self.agreement:.1%} of {self.crops} held-out crops (of the labelled photos)",
            ),
            ("size", f"{size}: {self.smaller:.2f} times smaller"),
            *latency,
            ("int8 against eager", f"{self.faster:.1f} times faster"),
        ]
