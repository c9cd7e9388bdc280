"""Variational Bayes finds the planted rank of noisy matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.factorize.vbmf import vbmf_rank
from tests.models import example


def rank_of(matrix):
    return vbmf_rank(torch.linalg.svdvals(matrix.double()), *matrix.shape)


@settings(max_examples=40)
@given(
    rows=st.integers(20, 80),
    columns=st.integers(20, 120),
    rank=st.integers(0, 6),
    noise=st.sampled_from([0.0, 1e-3, 0.1, 0.3]),
    seed=st.integers(0, 1000),
)
def test_the_planted_rank_is_found(rows, columns, rank, noise, seed):
    # each planted singular value is near sqrt(rows * columns) >= 20, the largest of noise 0.3 below 0.3 * 20
    signal = example(rows, rank, seed=seed) @ example(rank, columns, seed=seed + 1)
    matrix = signal + noise * example(rows, columns, seed=seed + 2)
    assert rank_of(matrix) == rank


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (64, 576), (576, 64)])
def test_zeros_and_noise_have_no_rank(shape):
    assert rank_of(torch.zeros(shape)) == 0
    if min(shape) > 3:
        assert rank_of(example(*shape)) == 0


def test_the_scale_does_not_matter():
    matrix = example(40, 4) @ example(4, 50, seed=1) + 0.2 * example(40, 50, seed=2)
    assert [rank_of(scale * matrix) for scale in (1e-6, 1.0, 1e6)] == [4, 4, 4]
