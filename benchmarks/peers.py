"""Whole models against other runtimes, interleaved in one process: float32 and int8, the same threads and inputs.

``python benchmarks/peers.py --models resnet50,mobilenet_v2 --threads 1 --seconds 2 --output bench-out``: a table, and
``peers.json`` beside it. Weights are random (only the shapes matter for speed), calibration is one batch of noise.
Finished models are kept in the JSON file: an interrupted run goes on where it stopped, ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt as go
from graphopt.bench.peers import PEERS, compare
from graphopt.files import atomic_write
from graphopt.torchvision_import import torchvision_models

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1", "vgg16")
OURS = {"float32": "graphopt", "int8": "graphopt-int8"}
PEERS_OF = {
    "float32": ("torch", "torch.compile", "onnxruntime", "openvino"),
    "int8": ("onnxruntime-int8", "openvino-int8"),
}

log = logging.getLogger("peers")


def measure(name: str, threads: int, seconds: float, peers: list[str]) -> dict[str, Any]:
    """Compile one model in both precisions and time it beside the peers."""
    torch.manual_seed(0)
    model = torchvision_models().get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    program = go.capture(model, (x,))
    ours, compile_seconds = {}, {}
    for label, source in (
        (OURS["float32"], program),
        (OURS["int8"], go.passes.Quantize(calibration=[x])(program)),
    ):
        started = time.perf_counter()
        session = go.compile(source, threads=threads).session()
        compile_seconds[label] = time.perf_counter() - started
        ours[label] = lambda session=session: session(x.numpy())
    arrays = (x.numpy(),)
    comparison = compare(ours, peers, model, arrays, [arrays], threads, seconds)
    return {**comparison.to_json(), "compile_seconds": compile_seconds}


def rows(results: dict[str, Any]) -> list[str]:
    """A line a model and precision: milliseconds of each, and how many times faster than the best peer we are."""
    lines = [
        f"{'model':16} {'precision':9} {'graphopt':>9} {'best peer':>28} {'ratio':>6} {'torch':>8}"
    ]
    for key, result in results.items():
        medians = {name: 1e3 * timing["median"] for name, timing in result["timings"].items()}
        for precision, label in OURS.items():
            others = {
                n: medians[n] for n in PEERS_OF[precision] if n in medians and "torch" not in n
            }
            if not others:
                continue
            best = min(others, key=lambda n: others[n])
            peer = f"{best} {others[best]:.2f}"
            lines.append(
                f"{key:16} {precision:9} {medians[label]:9.2f} {peer:>28} "
                f"{others[best] / medians[label]:6.2f} {medians.get('torch', np.nan):8.1f}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each rival")
    default = "torch,onnxruntime,onnxruntime-int8,openvino,openvino-int8"
    parser.add_argument("--peers", default=default, help=f"of {', '.join(PEERS)}")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    parser.add_argument(
        "--fresh", action="store_true", help="measure models again that the file has"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "peers.json"
    results = {} if options.fresh or not path.exists() else json.loads(path.read_text())
    for name in options.models.split(","):
        key = f"{name}/{options.threads}"
        if key not in results:
            log.info("measuring %s", key)
            results[key] = measure(name, options.threads, options.seconds, options.peers.split(","))
            with atomic_write(path) as file:
                file.write(json.dumps(results, indent=1).encode())
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
