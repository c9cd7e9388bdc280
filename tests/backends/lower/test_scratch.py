"""What lies between kernels is allocated once: runs allocate their outputs, and outputs are the caller's."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError
from graphopt.runtime import tvm_runtime
from graphopt.session import Session


class _Branches(nn.Module):
    """Three outputs: one between two layers, a view of the last one, and the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.relu(self.first(x))
        last = self.third(torch.relu(self.second(first)))
        return first, last.flatten(1), last


@functools.cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Branches().eval()


def _images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn((batch, 4, 6, 6), generator=torch.Generator().manual_seed(seed))


def _session(dynamic_batch: tuple[int, int] | None = None) -> Session:
    program = go.capture(_model(), (_images(2),), dynamic_batch=dynamic_batch)
    return go.compile(program, threads=1).session()


@pytest.fixture(scope="module")
def dynamic() -> Session:
    return _session((1, 8))


def _check(outputs: Any, images: Tensor) -> None:
    with torch.no_grad():
        for have, want in zip(outputs, _model()(images), strict=True):
            # Float32 sums of 36 and 72 products in another order than PyTorch's.
            np.testing.assert_allclose(have, want.numpy(), rtol=1e-4, atol=1e-5)


def _allocations(session: Session, images: Tensor) -> list[str]:
    """What a machine allocates in its second run."""
    seen: list[str] = []

    def instrument(_function: Any, name: str, before: bool, *_: Any) -> int:
        if before and name.startswith("vm.builtin.alloc"):
            seen.append(name.removeprefix("vm.builtin.alloc_"))
        return 0

    machine = session._machine()
    machine.run([images.numpy()])
    machine.module["set_instrument"](tvm_runtime().convert(instrument))
    machine.run([images.numpy()])
    return seen


@pytest.mark.parametrize("batch", [None, (1, 8)])
def test_only_outputs_are_allocated_in_a_run(batch: tuple[int, int] | None) -> None:
    """Two tensors (one output is a view): a storage and a tensor each."""
    seen = _allocations(_session(batch), _images(2))
    assert [name for name in seen if name != "shape_heap"] == ["storage", "tensor"] * 2


def test_outputs_of_earlier_runs_stay(dynamic: Session) -> None:
    kept = [(seed, dynamic(_images(3, seed).numpy())) for seed in range(4)]
    for seed, outputs in kept:
        _check(outputs, _images(3, seed))


def test_batches_may_change_from_run_to_run(dynamic: Session) -> None:
    kept = []
    for batch in (1, 8, 8, 2, 1, 1, 5):
        with pytest.raises(InputError):
            dynamic(_images(9).numpy())
        kept.append((batch, dynamic(_images(batch).numpy())))
    for batch, outputs in kept:
        _check(outputs, _images(batch))


def test_threads_do_not_share_scratch(dynamic: Session) -> None:
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait()
        for batch in (seed + 1, 8, 4) * 10:
            _check(dynamic(_images(batch, seed).numpy()), _images(batch, seed))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
