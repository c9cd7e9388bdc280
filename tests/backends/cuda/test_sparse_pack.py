"""Weights pruned 2:4: which are recognised, what is kept of them, in which lane and which bits it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt as go
from graphopt.backends.cuda.sparse_pack import (
    FRAGMENT_BYTES,
    WEIGHT_BYTES,
    compress,
    is_two_of_four,
    pack_sparse,
)
from graphopt.backends.cuda.sparse_plan import SparseTile, plan_sparse
from tests.backends.cuda.harness import AMPERE, ConvCase, conv_workload
from tests.backends.cuda.simt_sparse import ORDERED, expand
from tests.backends.cuda.sparse_harness import SparseCase, prune

Array = np.ndarray[Any, Any]
SMALL = SparseTile(32, 32, (2, 2))


def _pruned_by_the_pass(layer: nn.Module, x: torch.Tensor, granularity: Any) -> Array:
    """The integer weight of a layer that was pruned, quantized and integerized, as OIHW."""
    torch.manual_seed(0)
    program = go.capture(nn.Sequential(layer).eval(), (x,))
    program = go.passes.Prune(granularity=granularity)(program)
    integer = go.integerize(go.passes.Quantize(calibration=[(x,)])(program))
    state = integer.graph_module.state_dict().values()
    (weight,) = (tensor.numpy() for tensor in state if tensor.dtype == torch.int8)
    taps: Array = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
    return taps


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(16, 8, 3), torch.randn(1, 16, 6, 6)),
        (nn.Conv2d(10, 9, (1, 3)), torch.randn(1, 10, 5, 6)),
        (nn.Conv2d(12, 20, 1), torch.randn(1, 12, 3, 3)),
        (nn.Linear(22, 12), torch.randn(4, 22)),
    ],
    ids=["3x3", "10 channels", "1x1", "linear"],
)
def test_what_the_pass_prunes_is_recognised(layer: nn.Module, x: torch.Tensor) -> None:
    weight = _pruned_by_the_pass(layer, x, go.passes.NM(2, 4))
    assert np.count_nonzero(weight) > weight.size // 3
    assert is_two_of_four(weight)
    assert is_two_of_four(_pruned_by_the_pass(layer, x, go.passes.NM(1, 4)))
    assert not is_two_of_four(_pruned_by_the_pass(layer, x, go.passes.NM(3, 4)))
    assert not is_two_of_four(_pruned_by_the_pass(layer, x, go.passes.Element()))


def test_groups_are_of_channels_and_of_one_tap() -> None:
    weight = np.ones((8, 2, 4, 4), np.int8)
    assert is_two_of_four(weight)  # two channels of each tap, sixteen taps
    assert not is_two_of_four(weight.transpose(0, 2, 1, 3))
    edge = np.zeros((1, 6, 1, 1), np.int8)
    edge[0, 2:6] = 1  # the last two of one group, both of the next
    assert is_two_of_four(edge)
    edge[0, 1] = 1
    assert not is_two_of_four(edge)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_what_is_kept_expands_to_the_weight(seed: int, rows: int, words: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-128, 128, (rows, 32 * words, 1, 1)).astype(np.int8)
    dense = prune(dense, rng, most)[:, :, 0, 0]
    values, metadata = compress(dense)
    found = np.zeros_like(dense)
    for row in range(rows):
        for group in range(8 * words):
            code = int(metadata[row, group // 8]) >> 4 * (group % 8) & 15
            assert code in ORDERED
            found[row, 4 * group + (code & 3)] += values[row, 2 * group]
            found[row, 4 * group + (code >> 2)] += values[row, 2 * group + 1]
    assert (found == dense).all()


def _packed() -> tuple[Array, Array, Array]:
    """A pruned 16 x 64 weight, and of its fragment the registers and the metadata, a lane each."""
    case = SparseCase(conv_workload((64, 16), kernel=(1, 1), padding=(0, 0)))
    plan = plan_sparse(case.workload, AMPERE, SMALL)
    packed = pack_sparse(plan, case.weight, case.bias, case.multiplier)[0]
    fragment = packed[:FRAGMENT_BYTES]  # of the other 16 channels of the tile there are none
    registers = fragment[:WEIGHT_BYTES].reshape(1, 32, 4, 4)
    return case.weight[:, :, 0, 0], registers, fragment[WEIGHT_BYTES:].view("<u4").reshape(1, 32)


def test_lanes_hold_what_the_documentation_says() -> None:
    weight, registers, words = _packed()
    assert (expand(registers, words)[0] == weight).all()


def test_metadata_lie_as_cutlass_orders_them() -> None:
    """A second source: CUTLASS's words of 32 columns, rows i and i + 8 beside each other, then 2 x 2 blocks transposed.

    They go to lanes by ``ldmatrix``: word i of 32 to lane i.
    """
    weight, _, words = _packed()
    plain = compress(weight)[1]
    ordered = np.zeros((16, 2), np.uint32)
    for row in range(16):
        for column in range(2):
            to = [row % 8 * 2 + row // 8, column]
            if to[0] % 2 != to[1] % 2:
                to = [to[0] + (1 if column else -1), 1 - column]
            ordered[to[0], to[1]] = plain[row, column]
    assert (ordered.reshape(-1) == words[0]).all()


def _at(layout: tuple[tuple[int, ...], tuple[int, ...]], number: int) -> tuple[int, int]:
    """Row and column of 16 x 64 that a layout (shape and strides, the first coordinate fastest) gives a number."""
    offset = 0
    for extent, stride in zip(*layout, strict=True):
        number, coordinate = divmod(number, extent)
        offset += coordinate * stride
    return offset % 16, offset // 16


def test_fragments_lie_as_in_cute() -> None:
    """A third source: ``ALayout`` and ``ELayout`` of 16 x 8 x 64 in ``mma_traits_sm120_sparse.hpp`` (NVIDIA/cutlass, 7107b055).

    Both number (lane, value) of the whole 16 x 64, two values to a kept one.
    """
    weight, registers, words = _packed()
    values, metadata = compress(weight)
    for lane in range(32):
        for register in range(4):
            row, k = _at(((4, 8, 8, 2, 2), (128, 1, 16, 8, 512)), lane + 32 * 8 * register)
            assert (registers[0, lane, register] == values[row, k // 2 : k // 2 + 4]).all()
        row, k = _at(((2, 2, 8, 32), (8, 512, 1, 16)), lane)
        assert words[0, lane] == metadata[row, k // 32]


def test_lanes_in_another_order_are_found() -> None:
    weight, registers, words = _packed()
    exchanged = words.reshape(8, 2, 2).swapaxes(1, 2).reshape(1, 32)
    assert not (expand(registers, exchanged)[0] == weight).all()
    assert not (expand(registers.swapaxes(1, 2).reshape(1, 32, 4, 4), words)[0] == weight).all()


def test_indices_in_another_order_are_found() -> None:
    _, registers, words = _packed()
    low, high = words & np.uint32(0x33333333), words & np.uint32(0xCCCCCCCC)
    with pytest.raises(AssertionError, match="metadata that is undefined"):
        expand(registers, low << np.uint32(2) | high >> np.uint32(2))


def test_a_fragment_is_five_eighths_of_the_dense_weight() -> None:
    case = ConvCase(conv_workload((128, 32), kernel=(1, 1), padding=(0, 0)))
    case.weight = prune(case.weight, case.rng)
    plan = plan_sparse(case.workload, AMPERE, SMALL)
    weight, bias, multiplier = pack_sparse(plan, case.weight, case.bias, case.multiplier)
    assert weight.nbytes == case.weight.nbytes * 5 // 8
    assert len(bias) == len(multiplier) == 32
