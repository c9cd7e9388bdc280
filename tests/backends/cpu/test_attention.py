"""Attention in one kernel against PyTorch in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from graphopt.backends.cpu.attention import attention
from graphopt.backends.cpu.tokens import Attention
from graphopt.errors import CompileError
from tests.backends.cpu.matrix_harness import assert_near, noise, physical, strided, viewed
from tests.backends.cpu.stream_harness import ROWS, run

HEADS = (0, 2, 1, 3)
SHAPES = [(2, 3, 5, 1, 3, 2), (1, 1, 1, 7, 1, 1), (1, 2, 29, 5, 47, 24), (1, 2, 39, 16, 39, 16)]
MASKS = {"none": None, "whole": (1, 1, 1, 1), "keys": (1, 0, 0, 1), "queries": (1, 1, 1, 0)}


def exact(arrays, mask, causal, scale):
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in arrays)
    total = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.float64)
    if mask is not None:
        total = total + torch.from_numpy(mask).double()
    if causal:
        total = total.masked_fill(torch.ones(total.shape[-2:]).tril() == 0, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=total, scale=scale).numpy()


def make(shape, mask="none", causal=False, dynamic=False, value_axes=HEADS):
    """Workload, its arguments, the float64 result in the memory order of y."""
    batch, heads, m, depth, n, columns = shape
    q, q_view = viewed(noise(1, batch, heads, m, depth), HEADS)
    k, k_view = viewed(noise(2, batch, heads, n, depth), HEADS)
    v, v_view = viewed(noise(3, batch, heads, n, columns), value_axes)
    y = np.zeros((batch, m, heads, columns), np.float32)
    arguments, views = [q, k, v], [(q_view, q), (k_view, k), (v_view, v)]
    full, added = (batch, heads, m, n), None
    kept = MASKS[mask]
    if kept is not None:
        added = noise(4, *(s if keep else 1 for s, keep in zip(full, kept, strict=True)))
        if mask == "whole":
            added[added > 0.3] = -np.inf
            added[:, :, 0] = -np.inf
    query, key, value = (strided(view, base, dynamic) for view, base in views)
    workload = Attention(
        query,
        key,
        value,
        strided(y.transpose(HEADS), y, dynamic),
        (None if dynamic else batch, heads),
        m,
        depth,
        n,
        columns,
        0.3,
        causal=causal,
    )
    if added is not None:
        repeated = strided(np.broadcast_to(added, full), added, dynamic)
        workload = dataclasses.replace(workload, mask=repeated)
        arguments.append(added)
    want = exact((q_view, k_view, v_view), added, causal, 0.3).transpose(HEADS)
    return workload, [physical(a) for a in arguments], physical(np.ascontiguousarray(want))


def check(row, threads, *case, **options):
    workload, arguments, want = make(*case, **options)
    kernel = attention(workload, row, threads)
    assert_near(run(kernel, row, *arguments, out=want.astype(np.float32)), want)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, row):
    check(row, 1, shape)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[-1]], ids=lambda row: row.name)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_masks(shape, mask, causal, row):
    """A row that is masked everywhere is 0."""
    check(row, 1, shape, mask, causal)


@pytest.mark.parametrize("dynamic", [False, True])
def test_threads_and_a_dynamic_batch(dynamic):
    for shape in SHAPES[:3]:
        check(ROWS[0], 2, shape, "whole", dynamic=dynamic)


def test_values_transposed():
    check(ROWS[0], 1, SHAPES[2], value_axes=(0, 2, 3, 1))


def test_large_scores_do_not_overflow():
    workload, arguments, _ = make(SHAPES[3])
    workload = dataclasses.replace(workload, scale=300.0)
    arguments[0] = arguments[0] * 10
    out = np.zeros((1, 1, 39 * 2, 16), np.float32)
    result = run(attention(workload, ROWS[0], 1), ROWS[0], *arguments, out=out)
    assert np.isfinite(result).all()


def test_a_wrong_scale_shows():
    """What the comparison is worth: a scale off by one part in 1,000 fails it."""
    workload, arguments, want = make(SHAPES[3])
    kernel = attention(dataclasses.replace(workload, scale=0.3003), ROWS[0], 1)
    with pytest.raises(AssertionError):
        assert_near(run(kernel, ROWS[0], *arguments, out=want.astype(np.float32)), want)


def test_strides_it_does_not_take():
    workload, _, _ = make(SHAPES[2], "whole")
    assert workload.mask is not None
    turned = dataclasses.replace(workload.y, strides=(*workload.y.strides[:-1], 2))
    with pytest.raises(CompileError, match="attention writes columns side by side, not 2 apart"):
        attention(dataclasses.replace(workload, y=turned), ROWS[0], 1)
    turned = dataclasses.replace(workload.mask, strides=(*workload.mask.strides[:-1], 2))
    with pytest.raises(CompileError, match="reads a mask's columns side by side, not 2 apart"):
        attention(dataclasses.replace(workload, mask=turned), ROWS[0], 1)
