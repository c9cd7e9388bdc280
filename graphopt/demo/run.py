"""The way of the demo: capture, fold, calibrate, compile twice, measure, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.demo import measure, network, photos
from graphopt.demo.page import page
from graphopt.demo.result import EAGER, FLOAT, INT8, Result, Slow
from graphopt.files import atomic_write

if TYPE_CHECKING:
    import torch

    from graphopt.bench import Report

    Step = Callable[[str], AbstractContextManager[None]]

MODEL, NUMBERS, PAGE = "efficientnet_lite0_int8.gopt", "demo.json", "index.html"
_LATENCY_SECONDS = 2.0


def _eager(model: torch.nn.Module) -> measure.Model:
    import torch

    def call(pictures: measure.Array) -> measure.Array:
        with torch.inference_mode():
            return model(torch.from_numpy(pictures)).numpy()  # type: ignore[no-any-return]

    return call


def _weight_bytes(model: torch.nn.Module) -> int:
    """The size of the float weights as a safetensors file."""
    import safetensors.torch

    return len(safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()}))


def _slowest(report: Report) -> tuple[Slow, ...]:
    return tuple(
        Slow(
            layer=row.kernel.layer,
            operator=row.kernel.operator or row.kernel.name,
            milliseconds=row.seconds * 1e3,
            share=report.share(row),
            gops=row.gops,
            share_of_peak=report.share_of_peak(row),
        )
        for row in report.slowest(5)
    )


def run(output: Path, step: Step) -> Result:
    """Run the demo and write the ``.gopt``, ``demo.json`` and ``index.html`` into ``output``.

    ``step(label)`` surrounds each part of the work. Each file is written whole or not at all. Raises InputError
    where the packages of the extra ``demo`` are missing, and what compiling raises.
    """
    import json

    import torch

    import graphopt as go
    from graphopt.bench import time_interleaved

    started = time.perf_counter()
    with step("loading the network and the photos"):
        model = network.load()
        calibration = photos.calibration()
        pictures, labels = photos.labelled()
        crops = photos.held_out()
    example = torch.from_numpy(pictures[:1])
    with step("capturing, folding batch norms"):
        program = go.passes.FoldBatchNorm()(go.capture(model, (example,)))
    with step(f"quantizing on {len(calibration)} crops"):
        batches = [torch.from_numpy(picture[None]) for picture in calibration]
        quantized = go.passes.Quantize(calibration=batches)(program)
    with step("compiling int8"):
        artifact = go.compile(quantized, target="native", threads=1)
        artifact.save(output / MODEL)
    with step("compiling f32"):
        float_session = go.compile(program, target="native", threads=1).session()
    session = go.load(output / MODEL)
    eager = _eager(model)
    with step(f"classifying {len(pictures)} photos and {len(crops)} crops"):
        float_correct = measure.equal(measure.classes(eager, pictures), labels)
        int8_correct = measure.equal(measure.classes(session, pictures), labels)
        agreeing = measure.equal(measure.classes(eager, crops), measure.classes(session, crops))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with step("measuring latency, interleaved, one thread"):
            calls: dict[str, Any] = {
                EAGER: lambda: eager(pictures[:1]),
                FLOAT: lambda: float_session(pictures[:1]),
                INT8: lambda: session(pictures[:1]),
            }
            timings = time_interleaved(calls, _LATENCY_SECONDS)
            report = go.benchmark(session, (pictures[:1],), seconds=_LATENCY_SECONDS)
    finally:
        torch.set_num_threads(threads)
    result = Result(
        network=network.NAME,
        machine=report.machine,
        target=report.target,
        photos=len(labels),
        float_correct=float_correct,
        int8_correct=int8_correct,
        crops=len(crops),
        agreeing=agreeing,
        float_bytes=_weight_bytes(model),
        int8_bytes=(output / MODEL).stat().st_size,
        latency={name: timing.median * 1e3 for name, timing in timings.items()},
        slowest=_slowest(report),
        calibration=len(calibration),
        seconds=time.perf_counter() - started,
    )
    with atomic_write(output / NUMBERS) as file:
        file.write(json.dumps(result.to_json(), indent=2).encode() + b"\n")
    with atomic_write(output / PAGE) as file:
        file.write(page(result).encode())
    return result
