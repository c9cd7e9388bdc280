"""The check around every pass in every test: rounding that a network does by itself is no pass's fault, a wrong value is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.contract import difference
from tests.conftest import _beyond_rounding

EPSILON = 3e-5


class _Shifted(nn.Module):
    """``(x + 8000) - 8000``: loses 2e-4; ``scale`` is the fault."""

    def __init__(self, shift: float, scale: float = 1.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift) - self.shift


def test_only_what_goes_beyond_the_programs_own_rounding_counts() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    before, exact, wrong = (
        go.capture(_Shifted(*options), (x,)) for options in ((8e3,), (0.0,), (0.0, 1.001))
    )
    assert difference(before(x), exact(x)) > EPSILON
    assert _beyond_rounding(before, exact, (x,)) <= 0
    assert _beyond_rounding(before, wrong, (x,)) > EPSILON
