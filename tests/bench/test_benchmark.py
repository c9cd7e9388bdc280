"""The report of a session: every kernel, named, with the numbers that its JSON also has."""

from __future__ import annotations

import json

import pytest

from graphopt.bench import (
    Comparison,
    KernelTime,
    Report,
    Timing,
    benchmark,
    measure_peaks,
    time_kernels,
)
from graphopt.errors import BenchmarkError, InputError
from graphopt.manifest import Dim, Kernel, Peak, TensorSpec
from graphopt.session import Session
from tests import compiled

_TIMING = Timing(2e-3, 1e-3, 3e-3, 5e-4, 9)


@pytest.fixture(scope="module")
def session() -> Session:
    return compiled.artifact().session(threads=1)


def _peak(name: str = "relu", macs: int = 1000) -> Peak:
    shape = (Dim("n"), compiled.OUTPUTS)
    tensors = tuple(TensorSpec(letter, "float32", shape) for letter in "xy")
    return Peak(name, "float32", macs, tensors)


def test_every_kernel_has_a_row_in_order_with_its_layer_and_macs(session: Session) -> None:
    rows = time_kernels(session, (compiled.inputs(4),), runs=3)
    assert [(row.index, row.kernel.name, row.kernel.layer) for row in rows] == [
        (0, "matmul", "fc"),
        (1, "add", "fc"),
        (2, "relu", "act"),
    ]
    macs = 4 * compiled.FEATURES * compiled.OUTPUTS
    assert [row.macs for row in rows] == [macs, None, None]
    assert rows[0].gops == pytest.approx(2e-9 * macs / rows[0].seconds)
    assert rows[1].gops is None
    assert all(row.seconds > 0 for row in rows)


def test_a_kernel_called_twice_takes_the_entries_of_its_name_in_turn() -> None:
    kernels = (Kernel("relu", "first"), Kernel("relu", "second"), Kernel("matmul", "fc"))
    rows = time_kernels(compiled.artifact(kernels=kernels).session(), (compiled.inputs(),), runs=1)
    assert [row.kernel.layer for row in rows] == ["fc", "", "first"]


def test_images_that_are_run_one_by_one_count_together() -> None:
    outputs = compiled.manifest().outputs[:3]
    artifact = compiled.artifact({"tuple": [0, 1, 2]}, image_by_image=True, outputs=outputs)
    rows = time_kernels(artifact.session(threads=1), (compiled.inputs(4),), runs=3)
    assert [row.kernel.name for row in rows] == ["matmul", "add", "relu"]
    assert rows[0].macs == 4 * compiled.FEATURES * compiled.OUTPUTS
    assert rows[0].fastest <= rows[0].seconds


def test_the_report_and_its_json_say_the_same(session: Session) -> None:
    report = benchmark(session, compiled.inputs(), runs=5, peaks={"float32": 50.0})
    body = json.loads(json.dumps(report.to_json()))
    assert body["latency"]["runs"] == 5
    assert body["inputs"] == {"x": "float32 [3, 64]"}
    assert body["threads"] == 1
    assert body["target"] == "x86-64"
    row = body["kernels"][0]
    assert row["share_of_peak"] == pytest.approx(row["gops"] / 50.0)
    spent = sum(row["seconds"] for row in body["kernels"]) + body["outside_kernels"]
    assert sum(row["share"] for row in body["kernels"]) == pytest.approx(
        1 - body["outside_kernels"] / spent
    )
    text = report.render()
    assert all(word in text for word in ("matmul", "add", "relu", "fc", "outside kernels"))


def test_the_slowest_come_first(session: Session) -> None:
    report = benchmark(session, [compiled.inputs()], runs=5)
    times = [row.seconds for row in report.slowest()]
    assert times == sorted(times, reverse=True)
    assert len(report.slowest(2)) == 2
    assert report.share_of_peak(report.kernels[0]) is None  # this file carries no peak


def test_the_peak_is_measured_with_the_kernels_that_the_file_carries() -> None:
    fast = compiled.artifact(peaks=(_peak(),), threads=2).session()
    assert measure_peaks(fast)["float32"] > 0
    missing = compiled.artifact(peaks=(_peak("peak_int8"),)).session()
    with pytest.raises(BenchmarkError) as caught:
        measure_peaks(missing)
    assert str(caught.value) == (
        "the peak function 'peak_int8' is not in model.so; compile the model again"
    )


def test_no_inputs_and_wrong_inputs_are_errors(session: Session) -> None:
    with pytest.raises(BenchmarkError) as caught:
        benchmark(session, [])
    assert str(caught.value) == ("no inputs were given; pass one array for each input of the model")
    with pytest.raises(InputError, match=r"^argument 'x' has shape \[3, 63\]"):
        benchmark(session, compiled.inputs()[:, :63])


def test_a_comparison_ranks_and_shows_failures() -> None:
    slow = Timing(4e-3, 1e-3, 5e-3, 5e-4, 9)
    comparison = Comparison({"slow": slow, "fast": _TIMING}, {"odd": "no"}, {"o": "1"}, 1, "M")
    text = comparison.render()
    assert text.index("fast") < text.index("slow")
    assert "2.00" in text
    assert "odd failed: no" in text
    body = json.loads(json.dumps(comparison.to_json()))
    assert body["timings"]["slow"]["median"] == 4e-3
    assert body["failures"] == {"odd": "no"}


def test_what_is_outside_kernels_is_the_difference_of_the_fastest() -> None:
    rows = tuple(KernelTime(k, Kernel("k"), 2e-3, 1e-3, None) for k in range(2))

    def report(fastest: float) -> Report:
        return Report(Timing(9e-3, 8e-3, 1e-2, fastest, 9), rows, {}, "t", 1, "m", {})

    assert report(3e-3).outside_kernels == pytest.approx(1e-3)
    assert report(3e-3).share(rows[0]) == pytest.approx(2 / 5)
    assert report(1e-3).outside_kernels == 0.0
