"""A network whose convolution takes more shared memory than a kernel may declare, on the fake driver.

Run as a program of its own, like ``fake_gpu``. Prints a line of JSON: whether the outputs are the program's, and the most
bytes that a launch asked for.
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


def main() -> None:
    fake_gpu._launch = _remember
    Driver()
    conv_plan.TILES = conv_plan.TILES[:1]
    torch.manual_seed(3)
    model, x = nn.Conv2d(8, 20, 3, padding=1).eval(), torch.randn(1, 8, 15, 14)
    program = go.passes.Quantize(calibration=[(x,)])(go.capture(model, (x,)))
    artifact = go.compile(program, "sm_80")
    given = artifact.session()(x.numpy())
    check_faults()
    with torch.no_grad():
        want = artifact.program(x).numpy()
    print(json.dumps({"equal": bool(np.array_equal(given, want)), "bytes": max(_ASKED)}))


if __name__ == "__main__":
    main()
