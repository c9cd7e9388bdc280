"""What a measurement found: for a person as a table, for a program as JSON, the same numbers."""

from __future__ import annotations

import dataclasses
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.bench.kernels import KernelTime
from graphopt.bench.timing import Timing

_CPUINFO = Path("/proc/cpuinfo")


def machine_name() -> str:
    """Return the CPU's name as the system tells it."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _print(table: Any, width: int) -> str:
    from rich.console import Console  # only to show a table

    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _forms(row: KernelTime) -> tuple[str, str, str]:
    """The form chosen, the share of blocks left in the weights, and what the sparse form gains."""
    kernel = row.kernel
    gain = "" if kernel.sparse_gain is None else f"{kernel.sparse_gain:.2f}"
    return kernel.form, _percent(kernel.density), gain


@dataclass(frozen=True)
class Report:
    """A session's latency, and a row a kernel. ``peaks`` are the machine's GOPS by dtype."""

    latency: Timing
    kernels: tuple[KernelTime, ...]
    peaks: Mapping[str, float]
    target: str
    threads: int
    machine: str
    inputs: Mapping[str, str]

    @property
    def outside_kernels(self) -> float:
        """Seconds a call not spent in kernels: virtual machine, memory, Python.

        The fastest call less the fastest run of every kernel: medians would charge to it whatever
        interrupts a whole call more often than a short kernel.
        """
        return max(0.0, self.latency.fastest - sum(row.fastest for row in self.kernels))

    @property
    def accounted(self) -> float:
        """Seconds in kernels and outside them, of which every share is one."""
        return self.outside_kernels + sum(row.seconds for row in self.kernels)

    def share(self, row: KernelTime) -> float:
        """Return a kernel's share of the time that is accounted for."""
        return row.seconds / self.accounted

    def share_of_peak(self, row: KernelTime) -> float | None:
        """Return a kernel's share of the machine's peak for its dtype, where both are known."""
        peak = self.peaks.get(row.kernel.dtype)
        return None if row.gops is None or not peak else row.gops / peak

    def slowest(self, count: int | None = None) -> tuple[KernelTime, ...]:
        """Return the kernels by time, the slowest first."""
        return tuple(sorted(self.kernels, key=lambda row: -row.seconds)[:count])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; times in seconds."""
        rows = [
            {
                "index": row.index,
                **dataclasses.asdict(row.kernel),
                "macs": row.macs,
                "seconds": row.seconds,
                "fastest": row.fastest,
                "share": self.share(row),
                "gops": row.gops,
                "share_of_peak": self.share_of_peak(row),
            }
            for row in self.kernels
        ]
        return {
            "latency": {**dataclasses.asdict(self.latency), "spread": self.latency.spread},
            "kernels": rows,
            "outside_kernels": self.outside_kernels,
            "peaks_gops": dict(self.peaks),
            "target": self.target,
            "threads": self.threads,
            "machine": self.machine,
            "inputs": dict(self.inputs),
        }

    def table(self, count: int | None = None) -> Any:
        """Return the ``rich`` table of the ``count`` slowest kernels (default: all)."""
        from rich.table import Table  # only to show a table

        latency = self.latency
        table = Table(
            title=f"{1e3 * latency.median:.3f} ms a call (quartiles {1e3 * latency.lower:.3f} to "
            f"{1e3 * latency.upper:.3f}, {latency.runs} runs), {self.threads} threads, "
            f"{self.target} on {self.machine}"
        )
        for title in ("layer", "operator", "kernel"):
            table.add_column(title, overflow="fold")
        for title in ("us", "share", "GOPS", "of peak"):
            table.add_column(title, justify="right", no_wrap=True)
        pruned = any(row.kernel.density is not None for row in self.kernels)
        if pruned:
            for title in ("form", "blocks", "dense / sparse"):
                table.add_column(title, justify="right", no_wrap=True)
            table.caption = "blocks: with a non-zero; dense / sparse: the estimated times' ratio"
        for row in self.slowest(count):
            table.add_row(
                row.kernel.layer,
                row.kernel.operator,
                row.kernel.name,
                f"{1e6 * row.seconds:.1f}",
                _percent(self.share(row)),
                "" if row.gops is None else f"{row.gops:.0f}",
                _percent(self.share_of_peak(row)),
                *(_forms(row) if pruned else ()),
            )
        outside = self.outside_kernels
        table.add_section()
        table.add_row(
            "outside kernels", "", "", f"{1e6 * outside:.1f}", _percent(outside / self.accounted)
        )
        return table

    def render(self, count: int | None = None, width: int = 120) -> str:
        """Return the table as text."""
        return _print(self.table(count), width)


@dataclass(frozen=True)
class Comparison:
    """Rivals timed interleaved on the same inputs; ``failures`` are those that could not run."""

    timings: Mapping[str, Timing]
    failures: Mapping[str, str]
    versions: Mapping[str, str]
    threads: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; times in seconds."""
        return {
            "timings": {
                name: {**dataclasses.asdict(timing), "spread": timing.spread}
                for name, timing in self.timings.items()
            },
            "failures": dict(self.failures),
            "versions": dict(self.versions),
            "threads": self.threads,
            "machine": self.machine,
        }

    def table(self) -> Any:
        """Return the ``rich`` table, the fastest first."""
        from rich.table import Table  # only to show a table

        table = Table(title=f"{self.threads} threads on {self.machine}")
        table.add_column("runs by")
        for title in ("ms", "quartiles", "runs", "times the fastest"):
            table.add_column(title, justify="right", no_wrap=True)
        ranked = sorted(self.timings.items(), key=lambda item: item[1].median)
        for name, timing in ranked:
            table.add_row(
                name,
                f"{1e3 * timing.median:.3f}",
                f"{1e3 * timing.lower:.3f} to {1e3 * timing.upper:.3f}",
                str(timing.runs),
                f"{timing.median / ranked[0][1].median:.2f}",
            )
        if self.failures:
            lines = [f"{name} failed: {reason}" for name, reason in self.failures.items()]
            table.caption = "\n".join(lines)
        return table

    def render(self, width: int = 120) -> str:
        """Return the table as text."""
        return _print(self.table(), width)
