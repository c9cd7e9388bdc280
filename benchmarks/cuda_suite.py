"""What compiled models do on an NVIDIA GPU: the same bits as PyTorch's definition, and how fast, against PyTorch in float16.

``python cuda_suite.py --output results.json`` in the folder that ``make cuda-pack`` prepares; needs PyTorch with CUDA, nothing
else. A network's outputs are compared bit for bit with those of ``artifact.program``, which the folder holds; those of a network in
float16 within the tolerance that lies beside them. Times are of tensors on the device, by CUDA events, the contestants taking
turns; the table of kernels is CUPTI's, their rate beside the one that cuBLAS reaches on 8192 x 8192 x 8192.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_HERE = Path(__file__).resolve().parent
_PEAK_SIZE = 8192
PRUNED = "-2of4"  # behind the name of a case whose weights are pruned 2:4
HALF = "-float16"  # of one that is compiled in float16, not quantized
_WARM_UP, _BURST = 5, 10
_SECOND_RUN = 2  # the one that is recorded as a CUDA graph and replayed
_VERDICTS = ("correct", "graph_correct")

Call = Callable[[], object]


def _milliseconds(call: Call, runs: int) -> float:
    """Of one of ``runs`` calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(runs):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / runs


def time_interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Median and fastest milliseconds of every contestant; in each round every one has its turn."""
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_milliseconds(call, _BURST))
    return {
        name: {"median_ms": statistics.median(times), "fastest_ms": min(times)}
        for name, times in samples.items()
    }


def peaks(rounds: int) -> dict[str, float]:
    """Operations a second of a matrix product (two a multiplication) of int8 and of float16."""
    a, b = (
        torch.randint(-127, 128, (_PEAK_SIZE, _PEAK_SIZE), dtype=torch.int8, device="cuda")
        for _ in range(2)
    )
    c, d = a.half(), b.half()
    products = {"int8": lambda: torch._int_mm(a, b.T), "float16": lambda: c @ d.T}
    times = time_interleaved(products, rounds)
    return {name: 2.0 * _PEAK_SIZE**3 / (t["fastest_ms"] * 1e-3) for name, t in times.items()}


def compare(
    given: np.ndarray[Any, Any], want: np.ndarray[Any, Any], tolerance: float | None = None
) -> dict[str, Any]:
    """Whether two arrays have the same bits, how far apart they are, and if that is within a share of the largest value."""
    if given.shape != want.shape or given.dtype != want.dtype:
        return {"equal": False, "shape": list(given.shape), "dtype": str(given.dtype)}
    same = given.tobytes() == want.tobytes()
    distance = np.abs(given.astype(np.float64) - want.astype(np.float64))
    result = {
        "equal": same,
        "differing": int((given != want).sum()),
        "largest": float(distance.max()),
    }
    if tolerance is not None:
        result["within"] = bool(distance.max() <= tolerance * np.abs(want).max())
    return result


def is_right(verdict: Mapping[str, Any]) -> bool:
    """The same bits, or near enough where floats are rounded on the way."""
    return bool(verdict.get("within", verdict["equal"]))


def images(pixels: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """A batch of float32 from bytes, repeated as often as it takes."""
    repeated = np.resize(pixels, (batch, *pixels.shape[1:]))
    return (repeated.astype(np.float32) - 127.0) / 128.0


def peer(source: Path) -> torch.nn.Module:
    """The float network as PyTorch runs it, in float16 and channels last, with random weights of the same shapes."""
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.Network()
    return network.eval().cuda().half().to(memory_format=torch.channels_last)


def kernel_rows(
    call: Call, kernels: Any, batch: int, peak: float, runs: int
) -> list[dict[str, Any]]:
    """Microseconds of every kernel of a network and the share of the peak that it reaches, longest first."""
    macs = {f"{kernel.name}_kernel": kernel.macs for kernel in kernels}
    calls = {name: sum(f"{k.name}_kernel" == name for k in kernels) for name in macs}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    rows = []
    for event in profile.key_averages():
        if event.key not in macs:
            continue
        microseconds = event.device_time_total / event.count
        row = {"kernel": event.key, "calls": calls[event.key], "us": microseconds}
        if macs[event.key]:
            rate = 2.0 * macs[event.key] * batch / (microseconds * 1e-6)
            row |= {"tops": rate / 1e12, "share_of_peak": rate / peak}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["us"] * row["calls"])


def _session(folder: Path, **options: Any) -> Any:
    """The model of a case."""
    from graphopt import artifact

    with tempfile.TemporaryDirectory(prefix="graphopt-") as place:
        model = Path(place) / "model.gopt"
        model.write_bytes(lzma.decompress((folder / "model.gopt.xz").read_bytes()))
        return artifact.load(model, **options)


def run_case(
    folder: Path, peaks: Mapping[str, float], rounds: int, compile_peer: bool
) -> dict[str, Any]:
    """Correctness, times and kernels of one network; of a pruned one beside the one that is not."""
    with np.load(folder / "expected.npz") as saved:
        x, want = images(saved["pixels"], len(saved["y"])), saved["y"]
        tolerance = float(saved["tolerance"]) if "tolerance" in saved else None
    launches, graph = _session(folder, cuda_graphs=False), _session(folder)
    for _ in range(_SECOND_RUN):
        replayed = graph(x)
    result: dict[str, Any] = {
        "correct": compare(launches(x), want, tolerance),
        "graph_correct": compare(replayed, want, tolerance),
        "batch": len(x),
    }
    dtype = "int8" if tolerance is None else "float16"
    ours = f"graphopt {dtype}"
    on_device = torch.from_numpy(x).cuda()
    half = on_device.half().to(memory_format=torch.channels_last)
    calls: dict[str, Call] = {
        ours: lambda: launches.run_on_device(on_device),
        f"{ours}, CUDA graph": lambda: graph.run_on_device(on_device),
    }
    whole = folder.with_name(folder.name.removesuffix(PRUNED))
    if whole != folder and whole.is_dir():
        dense = _session(whole)
        if dense.manifest.inputs == graph.manifest.inputs:
            calls[f"{ours}, not pruned, CUDA graph"] = lambda: dense.run_on_device(on_device)
    network = peer(folder / "peer.py")
    calls["torch float16"] = lambda: network(half)
    if compile_peer:
        compiled = torch.compile(network, mode="max-autotune")
        calls["torch.compile float16"] = lambda: compiled(half)
    with torch.inference_mode():
        result["times"] = time_interleaved(calls, rounds)
    result["kernels"] = kernel_rows(
        calls[ours], launches.manifest.kernels, len(x), peaks[dtype], rounds
    )
    return result


def _summary(name: str, result: Mapping[str, Any]) -> str:
    times = ", ".join(f"{k} {v['median_ms']:.3f} ms" for k, v in result["times"].items())
    wrong = [result[key] for key in _VERDICTS if not is_right(result[key])]
    right = f"within {result['correct']['largest']:.3g}" if "within" in result["correct"] else ""
    verdict = f"WRONG: {wrong}" if wrong else right or "same bits"
    return f"{name}, batch {result['batch']}: {verdict}; {times}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("cuda-results.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", help="names of folders in cases/, separated by commas")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("cuda_suite: PyTorch sees no NVIDIA GPU on this machine", file=sys.stderr)
        return 2
    sys.path.insert(0, str(_HERE / "lib"))
    # tvm_ffi would compile an extension for a PyTorch that has no exchange API of its own
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    folders = sorted(path for path in (_HERE / "cases").iterdir() if path.is_dir())
    if options.models:
        folders = [_HERE / "cases" / name for name in options.models.split(",")]
    rates = peaks(options.rounds)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{f"{name}_peak_tops": rate / 1e12 for name, rate in rates.items()},
        "networks": {},
    }
    for folder in folders:
        found = run_case(folder, rates, options.rounds, not options.no_compile)
        results["networks"][folder.name] = found
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(_summary(folder.name, found), flush=True)
    networks = results["networks"].values()
    return 0 if all(is_right(n[key]) for n in networks for key in _VERDICTS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
