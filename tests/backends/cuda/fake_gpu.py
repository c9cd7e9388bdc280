"""A whole compiled model without a GPU: TVM's real host code and CUDA runtime on a fake driver, kernels interpreted.

Run as a program of its own, so that no other process maps the fake libraries (``LD_LIBRARY_PATH`` says where they are).
Prints a line of JSON a network, and one with what is said of a model for another GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from graphopt.bench.networks import NETWORKS
from graphopt.cuda_runtime import check_device
from graphopt.errors import TargetError
from tests.backends.cuda.simt import run_lowered

_SOURCE = Path(__file__).with_suffix(".c")
_DEVICE_FUNCTIONS: dict[str, Any] = {}
_FAULTS: list[BaseException] = []


def build_libraries(folder: Path) -> None:
    """``libcuda.so.1`` and ``libcudart.so.13`` in a folder; needs a C compiler."""
    script = folder / "versions"
    script.write_text("libcudart.so.13 { global: *; };\n")
    for name, options in (
        ("libcuda.so.1", ["-DDRIVER"]),
        ("libcudart.so.13", [f"-Wl,--version-script={script}"]),
    ):
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", *options]
        subprocess.run([*command, "-o", str(folder / name), str(_SOURCE)], check=True)


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


def _launch(name: bytes, config: Any, parameters: Any) -> None:
    try:
        function = _DEVICE_FUNCTIONS[name.decode()]
        values = []
        for i, parameter in enumerate(function.params):
            pointer = "Pointer" in type(parameter.ty).__name__
            kind = ctypes.c_void_p if pointer else ctypes.c_int32
            values.append(ctypes.cast(parameters[i], ctypes.POINTER(kind))[0])
        run_lowered(function, values, config[0], config[3])
    except BaseException as error:
        _FAULTS.append(error)


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


def _outputs(artifact: go.Artifact, x: torch.Tensor) -> Any:
    given = artifact.session()(x.numpy())
    if _FAULTS:
        raise _FAULTS[0]
    return given


def _run(name: str, artifact: go.Artifact, x: torch.Tensor) -> None:
    given = _outputs(artifact, x)
    with torch.no_grad():
        want = artifact.program(x).numpy()
    forms = sorted({kernel.form for kernel in artifact.manifest.kernels if kernel.form})
    equal = bool(np.array_equal(given, want))
    print(json.dumps({"network": name, "equal": equal, "forms": forms}), flush=True)


def _small_networks() -> None:
    """Fixed and dynamic batch, a float network, and what is said of a model for another GPU."""
    torch.manual_seed(3)
    model, x = Network().eval(), torch.randn(2, 3, 15, 14)
    _run("fixed", _compiled(model, x, dynamic=False), x)
    _run("dynamic", _compiled(model, x, dynamic=True), x[:1])
    float_program = go.capture(model, (x,))
    artifact = go.compile(float_program, "sm_80")
    with torch.no_grad():
        distance = np.abs(_outputs(artifact, x) - float_program(x).numpy()).max()
    print(json.dumps({"network": "float", "close": bool(distance < 1e-5)}), flush=True)
    try:
        check_device("sm_90", "model.gopt")
    except TargetError as error:
        print(json.dumps(str(error)))


def main(names: list[str]) -> None:
    """The small networks, or benchmarks' networks by name at 32 pixels: each against the program that was compiled."""
    _remember_device_functions()
    driver = ctypes.CDLL("libcuda.so.1")
    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
    )
    callback = kind(_launch)
    driver.fake_on_launch(callback)
    if not names:
        _small_networks()
    for name in names:
        torch.manual_seed(4)
        x = torch.randn(1, 3, 32, 32)
        _run(name, _compiled(NETWORKS[name].model(), x, dynamic=False), x)


if __name__ == "__main__":
    main(sys.argv[1:])
