"""The gate is a gate: with a fault put into the lowering, the comparison with the definition fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tvm.tirx.script.builder import ir as T

import graphopt as go
import graphopt.integer
from graphopt.backends.cpu import emit, epilogue
from graphopt.backends.cpu.conv_pack import pack_conv2d
from graphopt.backends.cpu.sparse_pack import pack_sparse
from graphopt.backends.cpu.sparse_store import SparseStore
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


class Residual(nn.Module):
    """What sparse kernels compute: taps of several lines, and a sum of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(64, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.last = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z: Tensor = self.last(torch.relu(self.second(y) + y))
        return z


class Ties(nn.Module):
    """Every odd level halved: each second result ends on .5."""

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.graphopt.quantize(x, 0.05, 20, 0, 255)
        halved = torch.ops.graphopt.requantize(q, 0.5, 20, 20, 0, 255)
        y: Tensor = torch.ops.graphopt.dequantize(halved, 0.1, 20)
        return y


def _sensitive() -> go.Program:
    return quantized(Sensitive().eval(), (_image(),))


def _pruned() -> go.Program:
    """Three 3 x 3 convolutions, the second one with a residual, with a twentieth of their 1 x 4 blocks."""
    torch.manual_seed(0)
    program = go.capture(Residual().eval(), (_wide_image(),))
    prune = go.passes.Prune(
        schedule=go.passes.PerLayer(0.95), granularity=go.passes.Block(inputs=4)
    )
    return go.passes.Quantize(calibration=[(_wide_image(),)])(prune(program))


def _ties() -> go.Program:
    return go.capture(Ties(), (_image(),))


def _image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((1, 8, 24, 24), generator=generator) * 4 - 1


def _half_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(value: Any, lanes: int, *_: Any) -> Any:
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


def _wide_image() -> Tensor:
    return torch.rand((1, 64, 28, 28), generator=torch.Generator().manual_seed(0)) * 4 - 1


def _in_packed(change: Callable[[list[Any]], None]) -> Fault:
    """A fault in what ``pack_sparse`` returns: values, bias, multiplier, taps, starts."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        def fault(*arguments: Any) -> Any:
            packed = pack_sparse(*arguments)
            change(packed)
            return packed

        monkeypatch.setattr(convolution, "pack_sparse", fault)

    return install


def _dropped_block(packed: list[Any]) -> None:
    packed[0][len(packed[0]) // 2] = 0


def _dropped_last_block_of_a_row(packed: list[Any]) -> None:
    row = int(np.argmax(np.diff(packed[4]) > 0))
    packed[0][packed[4][row + 1] - 1] = 0


def _swapped_channels(packed: list[Any]) -> None:
    for array in packed[1:3]:
        array[[0, 1]] = array[[1, 0]]


def _off_by_one_tap(packed: list[Any]) -> None:
    packed[3][len(packed[0]) // 2] += 1


def _residual_of_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = SparseStore._residual

    def fault(self: Any, index: int, channel: int) -> Any:
        return residual(self, index, 0)

    monkeypatch.setattr(SparseStore, "_residual", fault)


@pytest.mark.parametrize(
    "fault",
    [
        _in_packed(_dropped_block),
        _in_packed(_dropped_last_block_of_a_row),
        _in_packed(_swapped_channels),
        _in_packed(_off_by_one_tap),
        _residual_of_one_channel,
    ],
    ids=["dropped block", "dropped last block", "swapped channels", "tap", "residual"],
)
def test_fault_in_sparse_code_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (_wide_image(),)
    program = _pruned()
    fault(monkeypatch)
    broken = compiled(program, "avx2")
    assert [kernel.form for kernel in broken.manifest.kernels].count("sparse") == 3
    with pytest.raises(AssertionError, match="elements differ"):
        assert_bit_equal(run(broken, inputs), reference(broken.program, inputs))


def test_sparse_code_without_a_fault() -> None:
    inputs = (_wide_image(),)
    healthy = compiled(_pruned(), "avx2")
    assert [kernel.form for kernel in healthy.manifest.kernels].count("sparse") == 3
    assert_bit_equal(run(healthy, inputs), reference(healthy.program, inputs))


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
