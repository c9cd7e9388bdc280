"""Networks on the fake driver: a convolution of more shared memory than a kernel may declare, one whose steps blocks share.

Run as a program of its own, like ``fake_gpu``. Prints a line of JSON each: whether the outputs are the program's, the most
bytes that a launch asked for, and the forms of the kernels.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cuda import conv_plan
from tests.backends.cuda import fake_gpu
from tests.backends.cuda.fake_gpu import Driver, check_faults

_ASKED = [0]
_launch = fake_gpu._launch


def _remember(name: bytes, config: Any, parameters: Any, record: int) -> int:
    _ASKED.append(config[6])
    return _launch(name, config, parameters, record)


def _run(model: nn.Module, x: torch.Tensor) -> None:
    program = go.passes.Quantize(calibration=[(x,)])(go.capture(model.eval(), (x,)))
    artifact = go.compile(program, "sm_80")
    given = artifact.session()(x.numpy())
    check_faults()
    with torch.no_grad():
        equal = bool(np.array_equal(given, artifact.program(x).numpy()))
    forms = [kernel.form for kernel in artifact.manifest.kernels if kernel.form]
    print(json.dumps({"equal": equal, "bytes": max(_ASKED), "forms": forms}), flush=True)


def main() -> None:
    fake_gpu._launch = _remember
    Driver()
    torch.manual_seed(3)
    tiles = conv_plan.TILES
    conv_plan.TILES = tiles[:1]
    _run(nn.Conv2d(8, 20, 3, padding=1), torch.randn(1, 8, 15, 14))
    conv_plan.TILES = tiles
    _run(nn.Conv2d(512, 40, 3, padding=1), torch.randn(1, 512, 5, 5))


if __name__ == "__main__":
    main()
