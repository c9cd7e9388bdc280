"""Pictures of what was measured: rivals as bars, kernels under the roofs of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS = "#2b8a57", ("#3b6fb5", "#7a9cc6", "#9aa3ad", "#c3cad1", "#d98c3f")
_MARKERS = ("o", "^", "s", "D", "v")


@dataclass(frozen=True)
class Point:
    """A kernel: operations a byte, giga-operations a second, and what kind of layer it is."""

    intensity: float
    gops: float
    kind: str


@dataclass(frozen=True)
class Roofs:
    """What the machine can do for one element type: ``peak`` GOPS, and GB/s by the memory that the data comes from."""

    title: str
    peak: float
    bandwidths: Mapping[str, float]


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "graphopt"}):
        figure.savefig(path, dpi=120)


def bar_chart(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Latencies as multiples of graphopt's: ``panels[title][model][rival]``, the rival "graphopt" included.

    The suffix of ``path`` says the format (.svg, .png).
    """
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 5.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, models) in zip(axes, panels.items(), strict=False):
        _bars(axis, title, models)
    _save(figure, path)


def _bars(axis: Axes, title: str, models: Mapping[str, Mapping[str, float]]) -> None:
    named = dict.fromkeys(rival for latencies in models.values() for rival in latencies)
    others = [rival for rival in named if rival != "graphopt"]
    rivals = ["graphopt", *others]
    colours = {"graphopt": _OURS, **{r: _OTHERS[i % len(_OTHERS)] for i, r in enumerate(others)}}
    height = 0.8 / len(rivals)
    for place, rival in enumerate(rivals):
        known = [
            (
                row + (place - (len(rivals) - 1) / 2) * height,
                latencies[rival] / latencies["graphopt"],
            )
            for row, latencies in enumerate(models.values())
            if rival in latencies
        ]
        positions, values = zip(*known, strict=True)
        drawn = axis.barh(positions, values, height, color=colours[rival], label=rival)
        axis.bar_label(drawn, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axis.set_yticks(range(len(models)), list(models))
    axis.invert_yaxis()
    axis.axvline(1.0, color=_OURS, linewidth=1)
    axis.margins(x=0.1)
    axis.set_xlabel("latency, graphopt = 1 (longer bars are slower)")
    axis.set_title(title, loc="left", fontweight="bold")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=len(rivals))
    axis.spines[["top", "right"]].set_visible(False)


def roofline(path: Path, panels: Sequence[tuple[Roofs, Sequence[Point]]]) -> None:
    """Each kernel's speed over its intensity (Williams et al. 2009), below ``min(peak, bandwidth * intensity)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(panels), 5.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (roofs, points) in zip(axes, panels, strict=True):
        _roofline(axis, roofs, points)
    _save(figure, path)


def _roofline(axis: Axes, roofs: Roofs, points: Sequence[Point]) -> None:
    low = min(point.intensity for point in points) / 2
    high = max(point.intensity for point in points) * 2
    for memory, bandwidth in roofs.bandwidths.items():
        ridge = roofs.peak / bandwidth
        ends = [low, min(max(ridge, low), high), high]
        heights = [min(roofs.peak, bandwidth * intensity) for intensity in ends]
        axis.plot(ends, heights, linewidth=1, label=f"{memory}: {bandwidth:.0f} GB/s")
    axis.axhline(roofs.peak, color="black", linewidth=1.2, label=f"peak: {roofs.peak:.0f} GOPS")
    kinds = list(dict.fromkeys(point.kind for point in points))
    for kind, marker in zip(kinds, _MARKERS * len(kinds), strict=False):
        chosen = [point for point in points if point.kind == kind]
        intensities, speeds = [p.intensity for p in chosen], [p.gops for p in chosen]
        axis.scatter(intensities, speeds, s=22, marker=marker, label=kind, alpha=0.75)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte moved")
    axis.set_ylabel("GOPS (a multiply-accumulate is two; Winograd: direct-equivalent)")
    axis.set_title(roofs.title, loc="left", fontweight="bold")
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.25, which="major")


def trade_offs(path: Path, recipes: Mapping[str, tuple[float, float, float]]) -> None:
    """Accuracy in percent over a file's KiB and over microseconds: ``recipes[title] = (KiB, microseconds, accuracy)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, place, label in zip(axes, (0, 1), ("file, KiB", "latency, us"), strict=True):
        for number, (title, recipe) in enumerate(recipes.items(), 1):
            point = recipe[place], recipe[2]
            # in the legend the title, at the point its number: titles would cover each other
            axis.plot(*point, "o", color=_OURS, label=f"{number} {title}")
            axis.annotate(str(number), point, (4, 3), textcoords="offset points", fontsize="small")
        axis.set_xscale("log")
        for formatted in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            formatted("{x:.0f}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", handlelength=0)
    axes[0].set_ylabel("accuracy, %")
    _save(figure, path)
