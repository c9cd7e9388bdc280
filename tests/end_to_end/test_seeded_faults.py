"""The gate is a gate: with a fault put into the lowering, the comparison with the definition fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tvm.tirx.script.builder import ir as T

import graphopt as go
import graphopt.integer
from graphopt.backends.cpu import emit, epilogue
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.lower import convolution
from tests.end_to_end.support import assert_bit_equal, compiled, quantized, reference, run

Fault = Callable[[pytest.MonkeyPatch], None]


class Sensitive(nn.Module):
    """One 2 x 3 convolution: large sums, a non-zero zero point, unequal window sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, (2, 3), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Ties(nn.Module):
    """Every odd level halved: each second result ends on .5."""

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.graphopt.quantize(x, 0.05, 20, 0, 255)
        halved = torch.ops.graphopt.requantize(q, 0.5, 20, 20, 0, 255)
        y: Tensor = torch.ops.graphopt.dequantize(halved, 0.1, 20)
        return y


def _sensitive() -> go.Program:
    return quantized(Sensitive().eval(), (_image(),))


def _ties() -> go.Program:
    return go.capture(Ties(), (_image(),))


def _image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((1, 8, 24, 24), generator=generator) * 4 - 1


def _half_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(value: Any, lanes: int) -> Any:
        half = emit.select(
            value < emit.constant("float32", 0, lanes),
            emit.constant("float32", -0.5, lanes),
            emit.constant("float32", 0.5, lanes),
        )
        return T.cast(emit.bind(value + half), emit.vector("int32", lanes))

    monkeypatch.setattr(epilogue, "round_to_int", fault)


def _no_zero_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(workload: Any, *arguments: Any) -> Any:
        return pack_conv2d(dataclasses.replace(workload, x_zero_point=0), *arguments)

    monkeypatch.setattr(convolution, "pack_conv2d", fault)


def _saturating_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    dot = emit.dot

    def fault(isa: Any, *arguments: Any) -> Any:
        wide = emit.bind(dot(isa, *arguments))
        low, high = (emit.constant("int32", bound, isa.lanes) for bound in (-32768, 32767))
        return T.max(T.min(wide, high), low)

    monkeypatch.setattr(emit, "dot", fault)


def _swapped_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(workload: Any, isa: Any, weight: Any, *rest: Any) -> Any:
        swapped = weight.transpose(0, 1, 3, 2).reshape(weight.shape)
        return pack_conv2d(workload, isa, swapped, *rest)

    monkeypatch.setattr(convolution, "pack_conv2d", fault)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (_ties, _half_away),
        (_sensitive, _no_zero_point),
        (_sensitive, _saturating_dot),
        (_sensitive, _swapped_axis),
    ],
)
def test_fault_is_found(
    make: Callable[[], go.Program], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (_image(),)
    program = make()
    healthy = compiled(program)
    assert_bit_equal(run(healthy, inputs), reference(healthy.program, inputs))
    fault(monkeypatch)
    broken = compiled(program)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_bit_equal(run(broken, inputs), reference(broken.program, inputs))
