"""One convolution as a program, smooth inputs, and the error of a substitute as the user sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.passing import Pass

GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"padding": 1},
    {"padding": 0},
    {"padding": 2},
    {"padding": 1, "stride": 2},
    {"padding": 0, "stride": (2, 1)},
    {"padding": (0, 1), "dilation": (1, 2)},
    {"padding": 2, "dilation": 2, "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Inputs as layers see them: not negative, neighbours alike."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1, 1).relu() * 2


def convolution(inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, kernel, **options).eval()


def capture(model: nn.Module, x: Tensor) -> go.Program:
    return go.capture(model.eval(), (x,))


def substituted(model: nn.Module, pass_: Pass, x: Tensor) -> tuple[go.Program, float]:
    """The program and ``||y - y'|| / ||y - mean(y)||`` on ``x``."""
    program = capture(model, x)
    result = pass_(program)
    with torch.no_grad():
        want, have = program(x), result(x)
    assert want.shape == have.shape
    mean = want.mean((0, 2, 3), keepdim=True)
    return result, float((want - have).norm() / (want - mean).norm())
