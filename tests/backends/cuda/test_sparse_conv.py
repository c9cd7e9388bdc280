"""int8 convolution on sparse tensor cores, run by the interpreter: bit for bit the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda import sparse_conv
from graphopt.backends.cuda.sparse_pack import FRAGMENT_BYTES, WEIGHT_BYTES, pack_sparse
from graphopt.backends.cuda.sparse_plan import TILES, SparseTile
from tests.backends.cuda import sparse_harness
from tests.backends.cuda.harness import CONV_SHAPES, conv_workload
from tests.backends.cuda.simt_memory import Fault
from tests.backends.cuda.sparse_harness import SparseCase

Array = np.ndarray[Any, Any]
SMALL = SparseTile(32, 32, (2, 2))


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def test_every_tile(tile: SparseTile) -> None:
    case = SparseCase(conv_workload((20, 40)))
    assert (case.by_sparse_tensor_cores(tile) == case.expected()).all()


@pytest.mark.parametrize("workload", CONV_SHAPES.values(), ids=CONV_SHAPES)
def test_shapes(workload: Conv2d) -> None:
    case = SparseCase(workload)
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


@pytest.mark.parametrize("zero_point", [-7, 0])
def test_signed_bytes(zero_point: int) -> None:
    workload = conv_workload((20, 37), dtype="int8", x_zero_point=zero_point, residual=True)
    case = SparseCase(workload)
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


def test_a_residual_sum_is_added_on_the_way_out() -> None:
    case = SparseCase(conv_workload((20, 37), residual=True))
    assert (case.by_sparse_tensor_cores(TILES[3]) == case.expected()).all()


def test_float_results() -> None:
    case = SparseCase(conv_workload((20, 37), floats=True))
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


def test_a_batch_that_is_known_only_at_the_call() -> None:
    case = SparseCase(conv_workload((16, 16), batch=None), batch=3)
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


def test_extremes_do_not_saturate() -> None:
    """255 * 127 and 255 * -128 over the whole depth: an instruction that saturated would show."""
    case = SparseCase(conv_workload((128, 16), kernel=(1, 1), padding=(0, 0)))
    case.x[...] = 255
    case.weight[...] = 0
    case.weight[::2, 1::4], case.weight[::2, 3::4] = 127, 127
    case.weight[1::2, ::4], case.weight[1::2, 1::4] = -128, -128
    case.multiplier[...] = 1e-4
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


def test_weights_of_zeros_alone() -> None:
    case = SparseCase(conv_workload((12, 16)))
    case.weight[...] = 0
    assert (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()


def test_the_kernel_needs_its_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_conv, "synchronize", lambda: None)
    with pytest.raises(Fault):
        SparseCase(conv_workload((20, 40))).by_sparse_tensor_cores(SMALL)


def _exchange_registers(fragments: Array) -> None:
    registers = fragments[:, :WEIGHT_BYTES].reshape(-1, 32, 4, 4)
    fragments[:, :WEIGHT_BYTES] = registers[:, :, [1, 0, 2, 3]].reshape(len(fragments), -1)


def _exchange_lanes(fragments: Array) -> None:
    words = fragments[:, WEIGHT_BYTES:].reshape(-1, 8, 4, 4)
    fragments[:, WEIGHT_BYTES:] = words[:, :, [0, 2, 1, 3]].reshape(len(fragments), -1)


@pytest.mark.parametrize("fault", [_exchange_registers, _exchange_lanes])
def test_a_fault_in_the_packing_is_found(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    def packed(*arguments: Any) -> list[Array]:
        constants = pack_sparse(*arguments)
        fault(constants[0].reshape(-1, FRAGMENT_BYTES))
        return constants

    monkeypatch.setattr(sparse_harness, "pack_sparse", packed)
    case = SparseCase(conv_workload((64, 32), kernel=(1, 1), padding=(0, 0)))
    assert not (case.by_sparse_tensor_cores(SMALL) == case.expected()).all()
