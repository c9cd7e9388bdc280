"""A whole compiled model without a GPU: TVM's real host code and CUDA runtime on a fake driver, kernels interpreted.

Run as a program of its own, so that no other process maps the fake libraries (``LD_LIBRARY_PATH`` says where they are).
Prints a line of JSON a network, and one with what is said of a model for another GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from graphopt.bench.networks import NETWORKS
from graphopt.cuda_runtime import check_device
from graphopt.errors import TargetError
from tests.backends.cuda.signed_network import Signed
from tests.backends.cuda.simt import run_lowered

_SOURCE = Path(__file__).with_suffix(".c")
_ROOT = Path(__file__).parents[3]
_DEVICE_FUNCTIONS: dict[str, Any] = {}
_FAULTS: list[BaseException] = []
_RECORDED: list[Callable[[], None]] = []
_CALLBACKS: list[Any] = []  # what the driver has the addresses of


def build_libraries(folder: Path) -> None:
    """``libcuda.so.1`` and ``libcudart.so.13`` in a folder; needs a C compiler."""
    script = folder / "versions"
    script.write_text("libcudart.so.13 { global: *; };\n")
    for name, options in (
        ("libcuda.so.1", ["-DDRIVER"]),
        (
            "libcudart.so.13",
            [f"-Wl,--version-script={script}", f"-L{folder}", "-l:libcuda.so.1"],
        ),
    ):
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", *options]
        subprocess.run([*command, "-o", str(folder / name), str(_SOURCE)], check=True)


def run_on_fake(program: str, folder: Path, *arguments: str) -> list[str]:
    """The lines that a module beside this one prints as a program of its own on the fake libraries, built in a folder."""
    build_libraries(folder)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", f"{__package__}.{program}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=_ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def _remember_device_functions() -> None:
    """Keep what TVM compiles for the device, as it is after its passes."""
    module = importlib.import_module("tvm.tirx.build")
    original = module.codegen_build

    def remember(functions: Any, target: Any) -> Any:
        if target.kind.name == "cuda":
            for function in functions.functions.values():
                _DEVICE_FUNCTIONS[str(function.attrs["global_symbol"])] = function
        return original(functions, target)

    module.codegen_build = remember  # type: ignore[attr-defined]


def _values(function: Any, parameters: Any) -> list[Any]:
    """What a kernel is launched with: addresses and numbers."""
    values = []
    for i, parameter in enumerate(function.params):
        pointer = "Pointer" in type(parameter.ty).__name__
        kind = ctypes.c_void_p if pointer else ctypes.c_int32
        values.append(ctypes.cast(parameters[i], ctypes.POINTER(kind))[0])
    return values


def _launch(name: bytes, config: Any, parameters: Any, record: int) -> int:
    """Run a kernel, or keep the launch and return its number."""
    try:
        function = _DEVICE_FUNCTIONS[name.decode()]
        launch = functools.partial(
            run_lowered, function, _values(function, parameters), config[:3], config[3:6]
        )
        if record:
            _RECORDED.append(launch)
        else:
            launch()
    except BaseException as error:
        _FAULTS.append(error)
    return len(_RECORDED) - 1


def _replay(number: int) -> None:
    try:
        _RECORDED[number]()
    except BaseException as error:
        _FAULTS.append(error)


class Driver:
    """The fake driver, with its callbacks in place; one for the process."""

    def __init__(self) -> None:
        _remember_device_functions()
        self._library = ctypes.CDLL("libcuda.so.1")
        launch = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
        )
        _CALLBACKS[:] = launch(_launch), ctypes.CFUNCTYPE(None, ctypes.c_int)(_replay)
        self._library.fake_callbacks(*_CALLBACKS)

    def counts(self) -> dict[str, int]:
        """Kernels launched one by one, kernels run by graphs, allocations in captures, graphs that are there."""
        names = ("launched", "replayed", "mallocs", "graphs")
        return {name: self._library.fake_count(i) for i, name in enumerate(names)}


def check_faults() -> None:
    """Raise what went wrong in a kernel."""
    if _FAULTS:
        raise _FAULTS[0]


class Network(nn.Module):
    """One of each: strided, depthwise, point-wise, grouped, a residual sum, a concatenation, both pools, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, 2, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.point = nn.Conv2d(20, 20, 1)
        self.grouped = nn.Conv2d(20, 12, 3, 1, 1, groups=4)
        self.left, self.right = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 16, 3, 1, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.point(self.depthwise(x).relu())
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        x = self.grouped(x).relu()
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def _compiled(model: nn.Module, x: torch.Tensor, dynamic: bool) -> go.Artifact:
    program = go.capture(model, (x,), dynamic_batch=(1, 4) if dynamic else None)
    return go.compile(go.passes.Quantize(calibration=[(x,)])(program), "sm_80")


def _outputs(artifact: go.Artifact, x: torch.Tensor) -> tuple[Any, Any]:
    """Of kernels launched one by one, and of the same as a CUDA graph."""
    session = artifact.session()
    given = session(x.numpy()), session(x.numpy())
    check_faults()
    return given


def _run(name: str, artifact: go.Artifact, x: torch.Tensor) -> None:
    given, replayed = _outputs(artifact, x)
    with torch.no_grad():
        want = artifact.program(x).numpy()
    forms = sorted({kernel.form for kernel in artifact.manifest.kernels if kernel.form})
    equal = np.array_equal(given, want) and np.array_equal(replayed, want)
    print(json.dumps({"network": name, "equal": equal, "forms": forms}), flush=True)


def _small_networks() -> None:
    """Fixed and dynamic batch, a float network, and what is said of a model for another GPU."""
    torch.manual_seed(3)
    model, x = Network().eval(), torch.randn(2, 3, 15, 14)
    _run("fixed", _compiled(model, x, dynamic=False), x)
    _run("dynamic", _compiled(model, x, dynamic=True), x[:1])
    program = go.capture(Signed().eval(), (x[..., :8, :8],))
    _run("signed", go.compile(program, "sm_80"), x[..., :8, :8])
    float_program = go.capture(model, (x,))
    artifact = go.compile(float_program, "sm_80")
    given, replayed = _outputs(artifact, x)
    with torch.no_grad():
        distance = np.abs(given - float_program(x).numpy()).max()
    close = bool(distance < 1e-5) and np.array_equal(given, replayed)
    print(json.dumps({"network": "float", "close": close}), flush=True)
    try:
        check_device("sm_90", "model.gopt")
    except TargetError as error:
        print(json.dumps(str(error)))


def main(names: list[str]) -> None:
    """The small networks, or benchmarks' networks by name at 32 pixels: each against the program that was compiled."""
    Driver()
    if not names:
        _small_networks()
    for name in names:
        torch.manual_seed(4)
        x = torch.randn(1, 3, 32, 32)
        _run(name, _compiled(NETWORKS[name].model(), x, dynamic=False), x)


if __name__ == "__main__":
    main(sys.argv[1:])
