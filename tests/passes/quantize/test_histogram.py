"""The streaming histogram against ``np.histogram`` of the stored data."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.passes.quantize.histogram import StreamingHistogram

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def fill(batches, bins=64):
    histogram = StreamingHistogram(bins)
    for batch in batches:
        histogram.update(torch.tensor(batch, dtype=torch.float32))
    return histogram


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(floats, min_size=1, max_size=12), min_size=1, max_size=6))
@example([[0.0, 0.0], [1.0]])
@example([[1e-45], [3.4e38], [-3.4e38]])
@example([[-1.0], [1.0]])
def test_counts_are_those_of_the_stored_data_in_any_order(batches):
    histogram = fill(batches)
    values = np.array([v for batch in batches for v in batch], dtype=np.float32).astype(np.float64)
    assert histogram.counts.sum() == len(values)
    assert histogram.low == min(values.min(), 0.0)
    assert histogram.high == max(values.max(), 0.0)
    backwards = fill(batches[::-1])
    assert (backwards.counts == histogram.counts).all()
    assert (backwards.first, backwards.exponent) == (histogram.first, histogram.exponent)
    if histogram.exponent is not None:
        index = np.floor(np.ldexp(values, -histogram.exponent)).astype(int) - histogram.first
        assert (np.bincount(index, minlength=64) == histogram.counts).all()


def test_at_least_half_of_the_bins_are_used():
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high = sorted(rng.normal(size=2) * 10.0 ** rng.integers(-6, 6))
        histogram = fill([[low, high]])
        spread = histogram.high - histogram.low
        assert spread / histogram.width > 64 / 2 - 2


def test_the_state_does_not_grow():
    histogram = StreamingHistogram()
    sizes = set()
    for step in range(50):
        histogram.update(torch.randn(1000) * 2.0 ** (step % 7))
        sizes.add(sum(getattr(value, "nbytes", 0) for value in vars(histogram).values()))
    assert sizes == {4096 * 8}


def test_empty_tensors_change_nothing():
    histogram = fill([[1.0, 2.0]])
    histogram.update(torch.empty(0))
    assert histogram.counts.sum() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_values_are_counted(bad):
    with pytest.raises(ValueError, match="a histogram counts finite values"):
        StreamingHistogram().update(torch.tensor([1.0, bad]))
