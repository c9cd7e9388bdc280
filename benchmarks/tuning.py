"""The cost model against measurement: each distinct convolution and linear layer of the models, in float32 and int8.

``python benchmarks/tuning.py --models resnet50,mobilenet_v2 --budget 4m --store bench-out/tuning.sqlite``: one thread, a table
a model and the geometric mean of the cost model's time over the tuned time; ``tuning.json`` beside the store. The budget is a
model's in each precision; the store keeps what is measured, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from pathlib import Path

import torch

import graphopt as go
from graphopt.cli.console import print_table
from graphopt.files import atomic_write
from graphopt.torchvision_import import torchvision_models
from graphopt.tuning.report import COLUMNS, TuningReport


def programs(name: str, precisions: list[str]) -> dict[str, go.Program]:
    """A torchvision model with random weights, in each precision; int8 calibrated on one image of noise."""
    torch.manual_seed(0)
    model = torchvision_models().get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    program = go.capture(model, (x,))
    found = {"float32": program}
    if "int8" in precisions:
        found["int8"] = go.passes.Quantize(calibration=[x])(program)
    return {precision: found[precision] for precision in precisions}


def means(reports: dict[str, TuningReport]) -> dict[str, float]:
    """The geometric mean a model, and of all their measured layers together."""
    logs = [
        math.log(layer.ratio)
        for report in reports.values()
        for layer in report.layers
        if layer.model_seconds is not None
    ]
    found = {name: report.geometric_mean for name, report in reports.items()}
    return {**found, "all layers": math.exp(statistics.fmean(logs)) if logs else 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default="resnet50,mobilenet_v2")
    parser.add_argument("--precisions", default="float32,int8")
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", default="4m", help="of a model in one precision")
    parser.add_argument("--store", type=Path, default=Path("bench-out/tuning.sqlite"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    reports: dict[str, TuningReport] = {}
    for name in options.models.split(","):
        for precision, program in programs(name, options.precisions.split(",")).items():
            report = go.tune(
                program, options.target, options.budget, options.threads, options.store
            )
            reports[f"{name} {precision}"] = report
            print_table(f"{name} {precision}", COLUMNS, report.rows())
            print(report.line())
            if report.interrupted:
                raise SystemExit(130)
    results = {
        "geometric_means": means(reports),
        "models": {name: report.to_json() for name, report in reports.items()},
    }
    with atomic_write(options.store.with_suffix(".json")) as file:
        file.write(json.dumps(results, indent=1).encode())
    print(json.dumps(results["geometric_means"], indent=1))


if __name__ == "__main__":
    main()
