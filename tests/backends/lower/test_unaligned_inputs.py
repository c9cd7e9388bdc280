"""Kernels read a network's inputs wherever their elements begin; what else reads an input gets an aligned copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt.session import Session
from tests.end_to_end.support import RUNNABLE, compiled, quantized


class _Net(nn.Module):
    def __init__(self, returns_input: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.returns_input = returns_input

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(self.conv(x))
        return (y, x) if self.returns_input else (y,)


def _image(batch: int = 1) -> Tensor:
    return torch.randn((batch, 3, 9, 21), generator=torch.Generator().manual_seed(0))


def _model(returns_input: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return _Net(returns_input).eval()


def _at(offset: int, image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The image ``offset`` bytes behind a multiple of 64."""
    block = np.empty(4 * image.numel() + 128, np.uint8)
    start = -block.ctypes.data % 64 + offset
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.ndarray(
        tuple(image.shape), np.float32, block, start
    )
    array[...] = image.numpy()
    return array


def _is_copied(session: Session, offset: int) -> bool:
    take = session._machine().inputs[0]
    array = _at(offset, _image())
    return bool(take.tensor(array).data_ptr() != array.ctypes.data)


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("integer", [False, True])
def test_the_answer_is_the_same_at_every_offset(target: str, integer: bool) -> None:
    model, inputs = _model(), (_image(),)
    program = quantized(model, inputs) if integer else go.capture(model, inputs)
    session = compiled(program, target).session()
    assert [spec.alignment for spec in session.manifest.inputs] == [4]
    (wanted,) = session(_at(0, _image()))
    for offset in range(1, 64):
        assert np.array_equal(session(_at(offset, _image()))[0], wanted)
    assert not _is_copied(session, 4)
    assert _is_copied(session, 3)


def test_a_dynamic_batch_is_read_in_place() -> None:
    program = go.capture(_model(), (_image(2),), dynamic_batch=(1, 4))
    session = compiled(program).session()
    assert [spec.alignment for spec in session.manifest.inputs] == [4]
    for batch in (1, 4):
        (wanted,) = session(_at(0, _image(batch)))
        assert np.array_equal(session(_at(20, _image(batch)))[0], wanted)


@pytest.mark.parametrize("reader", ["output", "relax"])
def test_an_input_that_is_not_read_by_kernels_alone_is_copied(reader: str) -> None:
    model = _model(returns_input=True) if reader == "output" else nn.Softplus().eval()
    session = compiled(go.capture(model, (_image(),))).session()
    assert [spec.alignment for spec in session.manifest.inputs] == [64]
    assert _is_copied(session, 4)
    wanted, got = (pytree.tree_leaves(session(_at(offset, _image()))) for offset in (0, 4))
    for one, other in zip(wanted, got, strict=True):
        assert np.array_equal(one, other)
