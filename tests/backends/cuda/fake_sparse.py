"""A network pruned 2:4 on the fake driver: its layers on sparse tensor cores, its outputs those of the program.

Run as a program of its own, like ``fake_gpu``. Prints a line of JSON for int8 and a fixed batch, one for float16 and a dynamic one.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cuda import sparse_plan
from graphopt.bench.networks import NETWORKS
from graphopt.precision import FLOAT16, FLOAT32
from tests.backends.cuda.fake_gpu import Driver, check_faults


class Network(nn.Module):
    """A stem of three channels, layers of whole and of odd channels, a residual sum, a strided layer, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.wide = nn.Conv2d(64, 128, 3, 1, 1)
        self.again = nn.Conv2d(128, 128, 3, 1, 1)
        self.down = nn.Conv2d(128, 70, 3, 2, 1)
        self.odd = nn.Conv2d(70, 40, 3, 1, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.stem(x).relu()).relu()
        x = (x + self.again(x)).relu()
        x = self.odd(self.down(x).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def _run(model: nn.Module, x: torch.Tensor, batch: tuple[int, int] | None, precision: str) -> None:
    """Compile, call, compare."""
    program = go.capture(model, (x,), dynamic_batch=batch)
    program = go.passes.Prune(granularity=go.passes.NM(2, 4))(program)
    if precision == FLOAT32:
        program = go.passes.Quantize(calibration=[(x,)])(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_plan, "_GAIN", 10.0)  # maps that are quick to interpret gain nothing
        artifact = go.compile(program, "sm_80", precision=precision)
    given = artifact.session()(x.numpy())
    check_faults()
    with torch.no_grad():
        want = artifact.program(x).numpy()
    forms = [kernel.form for kernel in artifact.manifest.kernels if kernel.form]
    distance = float(np.abs(given - want).max() / np.abs(want).max())
    print(json.dumps({"distance": distance, "forms": forms}), flush=True)


def main(names: list[str]) -> None:
    """The small network, or benchmarks' networks by name in int8 at 96 pixels."""
    Driver()
    torch.manual_seed(3)
    if not names:
        model, x = Network().eval(), torch.randn(2, 3, 15, 14)
        _run(model, x, None, FLOAT32)
        _run(model, x, (1, 4), FLOAT16)
    for name in names:
        _run(NETWORKS[name].model(), torch.randn(1, 3, 96, 96), None, FLOAT32)


if __name__ == "__main__":
    main(sys.argv[1:])
