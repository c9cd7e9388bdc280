"""Observers against what NumPy finds in the stored data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import QuantizeError
from graphopt.passes.quantize.clipping import divergence, levels, quantized
from graphopt.passes.quantize.observers import OBSERVERS, ObserverOptions
from graphopt.passes.quantize.qparams import activation_qparams
from graphopt.passes.quantize.spec import ActivationSpec

SPEC = ActivationSpec()


def observe(name, batches, **options):
    observer = ObserverOptions(name, **options).make()
    for batch in batches:
        observer.update(batch, float(batch.min()), float(batch.max()))
    return observer


def stream(kind, count=8, size=4000):
    """Batches whose ranges grow, so that the histogram has to widen."""
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(size, generator=generator) * (1 + i) for i in range(count)]
    if kind == "relu":
        return [batch.relu() for batch in batches]
    if kind == "outliers":
        for batch in batches:
            batch[:2] *= 40
    return batches


def error(values, low, high):
    return float(np.mean((quantized(values, activation_qparams(low, high, SPEC)) - values) ** 2))


def test_minmax_is_the_smallest_and_the_largest_and_holds_zero():
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, 7.0])]
    assert observe("minmax", batches).range(SPEC) == (0.0, 7.0)


def test_moving_average_follows_its_equation():
    batches = stream("normal")
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low += 0.25 * (float(batch.min()) - low)
        high += 0.25 * (float(batch.max()) - high)
    assert observe("moving-average", batches, momentum=0.25).range(SPEC) == (low, high)


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
@pytest.mark.parametrize("percent", [99.0, 99.9])
def test_percentile_lies_between_the_neighbouring_order_statistics(kind, percent):
    batches = stream(kind)
    observer = observe("percentile", batches, percentile=percent)
    values = np.sort(torch.cat(batches).double().numpy())
    for found, rank in zip(observer.range(SPEC), (100 - percent, percent), strict=True):
        index = int(len(values) * rank / 100)
        near = np.clip(values[[index - 2, index + 1]], *((None, 0) if rank < 50 else (0, None)))
        assert near[0] - observer.histogram.width <= found <= near[1] + observer.histogram.width


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_mse_is_close_to_the_best_range_of_a_full_search(kind):
    batches = stream(kind)
    values = torch.cat(batches).double().numpy()
    low, high = min(values.min(), 0.0), values.max()
    grid = np.linspace(0.05, 1.0, 60)
    lows = grid if low < 0 else [1.0]
    best = min(error(values, low * a, high * b) for a in lows for b in grid)
    # The search moves one end at a time and sees bins instead of values: a tenth above the optimum at most.
    assert error(values, *observe("mse", batches).range(SPEC)) <= 1.1 * best


def test_mse_clips_where_bits_are_few():
    batches = stream("normal")
    low, high = observe("mse", batches).range(ActivationSpec(bits=3))
    assert high < 0.7 * max(float(batch.max()) for batch in batches)
    assert low > 0.7 * min(float(batch.min()) for batch in batches)


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_entropy_is_close_to_the_best_range_of_a_full_search(kind):
    """The definition over again: loops over the levels of NumPy's own histogram of the stored data."""
    batches = stream(kind)
    observer = observe("entropy", batches)
    edges = observer.histogram.edges
    counts, _ = np.histogram(torch.cat(batches).double().numpy(), edges)
    assert (counts == observer.histogram.counts).all()
    counts[np.searchsorted(edges, 0.0)] -= sum(int((batch == 0).sum()) for batch in batches)
    centres = (edges[:-1] + edges[1:]) / 2

    def cost(low, high):
        qparams = activation_qparams(low, high, SPEC)
        half = observer.histogram.width / 2
        inside = (centres >= low - half) & (centres <= high + half)
        reference = counts * inside.astype(float)
        first, last = np.flatnonzero(inside)[[0, -1]]
        reference[first] += counts[:first].sum()
        reference[last] += counts[last + 1 :].sum()
        level = levels(centres, qparams)
        average = np.zeros_like(reference)
        for index in range(256):
            members = inside & (level == index) & (reference > 0)
            if members.any():
                average[members] = counts[inside & (level == index)].sum() / members.sum()
        held = reference > 0
        p = reference[held] / reference.sum()
        q = np.maximum(average[held] / average.sum(), 1e-10)
        return float((p * np.log(p / q)).sum())

    low, high = observer.histogram.low, observer.histogram.high
    grid = np.linspace(0.1, 1.0, 12)
    best = min(cost(low * a, high * b) for a in (grid if low < 0 else [1.0]) for b in grid)
    # Only coordinates are searched: the divergence may be a tenth above that of the full grid.
    assert cost(*observer.range(SPEC)) <= 1.1 * best


def test_entropy_does_not_see_the_zeros_of_a_relu():
    batches = stream("relu")
    alone = [batch[batch > 0] for batch in batches]
    assert observe("entropy", batches).range(SPEC) == observe("entropy", alone).range(SPEC)


def test_divergence_of_a_distribution_from_itself_is_zero():
    counts = np.array([4.0, 4.0, 2.0, 2.0])
    assert divergence(counts, counts, np.array([0, 0, 1, 1]), 2) == 0.0


def test_divergence_of_two_bins_in_one_level_is_that_of_their_mean():
    counts = np.array([1.0, 3.0])
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert divergence(counts, counts, np.array([0, 0]), 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0], [-3.0], [1e-42, 2e-42], [-1e-30], [3e38, -3e38], [1.0, 1.0], [5.0, 6.0]],
    ids=str,
)
def test_a_degenerate_stream_gives_a_valid_scale(name, values):
    low, high = observe(name, [torch.tensor(values), torch.tensor(values)]).range(SPEC)
    qparams = activation_qparams(low, high, SPEC)
    assert 2.0**-126 <= qparams.scale <= 2.0**126
    assert 0 <= qparams.zero_point <= 255


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_seen_is_the_empty_range(name):
    assert ObserverOptions(name).make().range(SPEC) == (0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["percentile", "mse", "entropy"]),
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9), min_size=1, max_size=4
    ),
)
def test_a_clipped_range_lies_within_the_seen_one(name, lists):
    batches = [torch.tensor(values, dtype=torch.float32) for values in lists]
    low, high = observe(name, batches).range(SPEC)
    assert min(0.0, min(float(b.min()) for b in batches)) <= low <= 0.0
    assert 0.0 <= high <= max(0.0, max(float(b.max()) for b in batches))


def test_unknown_and_invalid_options_are_errors():
    with pytest.raises(QuantizeError) as caught:
        ObserverOptions("median")
    assert str(caught.value) == (
        "observer 'median' is none of minmax, moving-average, percentile, mse, entropy"
    )
    with pytest.raises(QuantizeError) as caught:
        ObserverOptions(percentile=40.0)
    assert str(caught.value) == "percentile must lie above 50 and at most at 100, not at 40.0"
    with pytest.raises(QuantizeError) as caught:
        ObserverOptions(momentum=0.0)
    assert str(caught.value) == "momentum must lie above 0 and at most at 1, not 0.0"
