"""Prepare the folder that ``cuda_suite.py`` runs from on a GPU machine: compiled models, expected outputs, TVM's runtime.

``python benchmarks/cuda_pack.py --arch sm_90 --output cuda-pack``: at most 60 MB. The GPU machine has PyTorch and NumPy; TVM's
binding for its Python comes along for every version of ``--pythons``, those other than this one's from PyPI.
"""

from __future__ import annotations

import argparse
import logging
import lzma
import math
import operator
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from cuda_suite import HALF, PRUNED, images
from torch import fx

import graphopt as go
from graphopt.backends.cuda.toolkit import INSTALL, find_nvcc
from graphopt.bench.networks import NETWORKS
from graphopt.cuda_runtime import package_libraries

LIMIT = 60_000_000
CASES = "efficientnet_lite0:1,mobilenet_v2:1,resnet18:1,resnet50:32,resnet50-2of4:32,resnet50-float16:32"
# Some 50 layers behind each other are each rounded to float16, the other way by 2**-10 of a value where float32 sums are taken in
# another order: 2**-10 * sqrt(50) if every one were, of the largest output.
TOLERANCE = 2.0**-7
DISTINCT = 4  # images of a batch; the others repeat them
_ROOT = Path(__file__).resolve().parents[1]
LEVELS = 7  # of a weight, on either side of 0
_LEAST = 2.0**-100  # a step: channels of trained networks may be all zeros
_UNUSED = (
    *("__pycache__", "*.pyi"),
    *("3rdparty", "cython", "include", "share", "src", "CMakeLists.txt"),
)
_SESSION = ("*.py", "backends/*.py", "backends/cuda/__init__.py", "backends/cuda/toolkit.py")
_CUDA_RUNTIME = "libcudart.so.13"

_PEER = """\
import torch
from torch import device

inf, nan = float("inf"), float("nan")


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
{parameters}

{forward}
"""

log = logging.getLogger("cuda_pack")


def peer_source(program: go.Program) -> str:
    """A Python module whose ``Network`` computes what the program does, its parameters random but of the same shapes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    root, names, lines = torch.nn.Module(), dict[str, str](), list[str]()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target not in names:
            names[target] = f"p{len(names)}"
            tensor = operator.attrgetter(target)(program.graph_module).detach()
            root.register_buffer(names[target], tensor)
            shape = list(tensor.shape)
            # keeps activations in float16's range through any depth
            scale = (2.0 / max(1, math.prod(shape[1:]))) ** 0.5 if len(shape) > 1 else 0.05
            made = f"torch.randn({shape}) * {scale:.4g}"
            lines.append(f"self.register_buffer({names[target]!r}, {made})")
        node.target = names[target]
    forward = fx.GraphModule(root, graph).code
    forward = forward[forward.index("def forward") :].rstrip()
    return _PEER.format(
        parameters=textwrap.indent("\n".join(lines), " " * 8),
        forward=textwrap.indent(forward, " " * 4),
    )


def coarse(model: torch.nn.Module, per_channel: bool = True) -> torch.nn.Module:
    """Weights of 15 values a channel or layer, which ``xz`` packs into half the bytes or less; no kernel knows."""
    for weight in model.parameters():
        if weight.ndim > 1:
            step = weight.detach().flatten(1).abs().amax(1) / LEVELS
            step = step if per_channel else step.amax().expand(step.shape)
            step = step.reshape(-1, *[1] * (weight.ndim - 1)).clamp_min(_LEAST)
            weight.data = (weight.detach() / step).round() * step
    return model


def make_case(name: str, batch: int, arch: str, folder: Path) -> None:
    """``model.gopt.xz``, ``expected.npz`` and ``peer.py`` of a network; as its name says pruned 2:4 by magnitude, or in float16."""
    network, half = NETWORKS[name.removesuffix(PRUNED).removesuffix(HALF)], name.endswith(HALF)
    (example,) = network.inputs()
    shape = (min(batch, DISTINCT), *example.shape[1:])
    few = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    x = torch.from_numpy(images(few, batch))
    float_program = go.capture(coarse(network.model(), not half), (x,))
    passes: list[go.Pass] = [go.passes.RemoveIdentities(), go.passes.FoldBatchNorm()]
    if name.endswith(PRUNED):
        passes += [go.passes.Prune(granularity=go.passes.NM(2, 4)), go.passes.ApplyMasks()]
    float_program = go.Pipeline(passes)(float_program)
    if half:
        artifact = go.compile(float_program, arch, precision="float16")
    else:
        artifact = go.compile(go.passes.Quantize(calibration=[(x,)])(float_program), arch)
    with torch.no_grad():
        y = artifact.program(x)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as place:
        model = artifact.save(Path(place) / "model.gopt").read_bytes()
    (folder / "model.gopt.xz").write_bytes(lzma.compress(model))
    expected = {
        "pixels": few,
        "y": y.numpy(),
        **({"tolerance": np.float64(TOLERANCE)} if half else {}),
    }
    np.savez_compressed(folder / "expected.npz", **expected)
    (folder / "peer.py").write_text(peer_source(float_program))
    log.info("%s: %.1f MB", name, folder_size(folder) / 1e6)


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def copy_runtime(lib: Path, pythons: list[str]) -> None:
    """graphopt, TVM's runtime libraries, its binding for each Python, CUDA's runtime library."""
    unused = shutil.ignore_patterns(*_UNUSED)
    for pattern in _SESSION:
        for path in (_ROOT / "graphopt").glob(pattern):
            target = lib / path.relative_to(_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copytree(_package("tvm_ffi"), lib / "tvm_ffi", ignore=unused)
    libraries = lib / "tvm" / "lib"
    libraries.mkdir(parents=True)
    (lib / "tvm" / "__init__.py").write_text(
        '"""Where the runtime libraries are; no compiler."""\n'
    )
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        shutil.copy(_package("tvm") / "lib" / name, libraries)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in pythons:
        if python != here:
            _add_binding(lib / "tvm_ffi", python)
    toolkits = Path("/usr/local").glob("cuda*/lib64")
    places = (folder / _CUDA_RUNTIME for folder in (*package_libraries(), *toolkits))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        log.warning("%s was not found here; the GPU machine must have it", _CUDA_RUNTIME)
        return
    target = lib / "nvidia" / "cu13" / "lib"
    target.mkdir(parents=True)
    shutil.copy(found, target / _CUDA_RUNTIME)


def _add_binding(package: Path, python: str) -> None:
    """The extension module of another Python's wheel."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        wanted = f"apache-tvm-ffi=={version('apache-tvm-ffi')}"
        options = ["--only-binary=:all:", "--no-deps", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", "--python-version", python, *options]
        subprocess.run([*command, wanted], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(r"tvm_ffi/core\.\S+\.so", name):
                    (package / Path(name).name).write_bytes(archive.read(name))


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="a GPU of `graphopt targets`")
    parser.add_argument("--output", type=Path, default=Path("cuda-pack"))
    cases = f"name:batch, separated by commas; name{PRUNED} is pruned 2:4"
    parser.add_argument("--models", default=CASES, help=cases)
    parser.add_argument("--pythons", default="3.11,3.12,3.13")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if find_nvcc() is None:
        raise SystemExit(f"cuda_pack: nvcc was not found; {INSTALL}")
    if options.output.exists():
        shutil.rmtree(options.output)
    for case in options.models.split(","):
        name, _, batch = case.partition(":")
        make_case(name, int(batch or 1), options.arch, options.output / "cases" / name)
    copy_runtime(options.output / "lib", options.pythons.split(","))
    shutil.copy(Path(__file__).with_name("cuda_suite.py"), options.output)
    size = folder_size(options.output)
    log.info("%s: %.1f MB; run there: python cuda_suite.py", options.output, size / 1e6)
    if size > LIMIT:
        raise SystemExit(
            f"cuda_pack: {size / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f}; leave a model out"
        )


if __name__ == "__main__":
    main()
