"""The float sum behind an int8 linear layer runs in its epilogue, rounded as the program rounds it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import graphopt as go


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x)
        return out


def test_the_sum_has_no_kernel_of_its_own_and_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 21, 64)
    program = go.passes.Quantize(calibration=[x])(go.capture(_Block().eval(), (x,)))
    artifact = go.compile(program, threads=1)
    assert any("linear_dequantize" in node.name for node in artifact.program.graph.nodes)
    names = [kernel.name for kernel in artifact.manifest.kernels]
    assert not any("add" in name for name in names), names
    with torch.no_grad():
        expected = artifact.program(x).numpy()
    np.testing.assert_array_equal(artifact.session()(x.numpy()), expected)
