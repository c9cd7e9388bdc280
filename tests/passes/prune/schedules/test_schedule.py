"""Choosing the lowest: exact counts, ties, granules of several sizes, what must stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import PassError
from graphopt.passes.prune import NM, Element, Global, PerLayer, Sensitivity, Threshold
from graphopt.passes.prune.schedules.schedule import lowest
from tests.passes.prune.sets import Sets


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_the_count_is_exact_and_no_kept_score_is_lower_than_a_dropped_one(values, share):
    scores = [torch.tensor(v, dtype=torch.float32) for v in values]
    kept = lowest(scores, [Sets(s, 3) for s in scores], share)
    flat, keep = torch.cat(scores), torch.cat(kept)
    dropped = int((~keep).sum())
    assert dropped == round(share * len(flat))
    if 0 < dropped < len(flat):
        assert flat[~keep].max() <= flat[keep].min()


def test_ties_go_in_order():
    (keep,) = lowest([torch.ones(6)], [Sets(torch.ones(6), 1)], 0.5)
    assert keep.tolist() == [False] * 3 + [True] * 3


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=2, max_size=12))
def test_granules_of_several_sizes_never_exceed_the_share(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    sizes = torch.tensor([size for _, size in rows])
    (keep,) = lowest([scores], [Sets(scores, sizes)], 0.5)
    amount = round(0.5 * int(sizes.sum()))
    order = scores.argsort(stable=True)
    dropped = [int(i) for i in order if not keep[i]]
    assert dropped == [int(i) for i in order[: len(dropped)]]
    assert int(sizes[dropped].sum()) <= amount
    if len(dropped) < len(rows):  # the next one would not have fitted
        assert int(sizes[dropped].sum() + sizes[order[len(dropped)]]) > amount


def test_no_set_loses_more_than_its_share_and_the_others_make_up_for_it():
    scores = [torch.arange(10.0), torch.arange(10.0) + 100]
    first, second = lowest(scores, [Sets(s, 1) for s in scores], 0.6, most=0.8)
    assert first.tolist() == [False] * 8 + [True] * 2
    assert second.tolist() == [False] * 4 + [True] * 6


def test_infinite_scores_stay_whatever_is_asked():
    scores = torch.tensor([0.0, torch.inf, 1.0, torch.inf])
    (keep,) = lowest([scores], [Sets(scores, 1)], 1.0)
    assert keep.tolist() == [False, True, False, True]


@pytest.mark.parametrize("schedule", [PerLayer(), Global(), Sensitivity()])
def test_a_half_where_nothing_is_said(schedule):
    assert schedule.resolved(Element().sparsity()).sparsity == 0.5


@pytest.mark.parametrize("schedule", [PerLayer(), Global(0.75)])
def test_the_granularity_may_fix_it(schedule):
    assert schedule.resolved(NM(1, 4).sparsity()).sparsity == 0.75


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Global(0.9).resolved(0.5),
            "prune: the granularity fixes the sparsity at 0.5; leave out sparsity=0.9",
        ),
        (
            lambda: Threshold(0.1).resolved(0.5),
            "prune: the granularity fixes the sparsity of every layer, which schedule threshold chooses; "
            "take per-layer, global or gradual",
        ),
        (
            lambda: Sensitivity().resolved(0.5),
            "prune: the granularity fixes the sparsity of every layer, which schedule sensitivity chooses; "
            "take per-layer, global or gradual",
        ),
        (lambda: Global(1.5), "schedule global: sparsity must be 0 to 1, not 1.5"),
        (lambda: Global(most=-1), "schedule global: most must be 0 to 1, not -1"),
        (lambda: PerLayer(-0.1), "schedule per-layer: sparsity must be 0 to 1, not -0.1"),
        (
            lambda: Threshold(-1),
            "schedule threshold: value must be at least 0, not -1; scores are not negative",
        ),
    ],
)
def test_what_does_not_hold_is_refused(make, message):
    with pytest.raises(PassError) as caught:
        make()
    assert str(caught.value) == message
