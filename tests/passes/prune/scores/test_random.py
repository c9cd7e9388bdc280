"""A score by chance."""

import torch

from graphopt.passes.prune import Filter, Random
from tests.passes.prune.support import capture, scores_of, small_cnn

PROGRAM = capture(small_cnn(), 1, 3, 8, 8)


def test_the_seed_decides():
    first, again, other = (scores_of(Random(seed), PROGRAM) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_large_granules_are_drawn_like_small_ones():
    scores = torch.cat([one.flatten() for one in scores_of(Random(), PROGRAM, Filter())])
    # a mean over the elements of a filter would keep all within 0.5 +- 0.1
    assert scores.min() < 0.2
    assert scores.max() > 0.8
