"""``(mean |w|**norm) ** (1 / norm)``."""

import pytest
import torch

from graphopt.errors import PassError
from graphopt.passes.prune import Block, Filter, Magnitude
from tests.passes.prune.support import capture, linear, scores_of

PROGRAM = capture(linear([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, -1.0, 2.0]]), 1, 4)


@pytest.mark.parametrize("norm", [1, 2])
def test_an_element_is_worth_its_magnitude(norm):
    (scores,) = scores_of(Magnitude(norm), PROGRAM)
    assert scores.flatten().tolist() == [3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0]


def test_blocks_by_both_norms():
    (first,) = scores_of(Magnitude(1), PROGRAM, Block())
    assert first.flatten().tolist() == [7 / 4, 5 / 4]
    (second,) = scores_of(Magnitude(2), PROGRAM, Block())
    assert second.flatten().tolist() == pytest.approx([2.5, (7 / 4) ** 0.5])  # sqrt((9 + 16) / 4)
    (filters,) = scores_of(Magnitude(2), PROGRAM, Filter())
    assert torch.equal(filters.flatten(), second.flatten())


def test_a_block_at_the_edge_is_a_mean_over_what_it_holds():
    program = capture(linear([[1.0, 1.0, 1.0, 1.0, 3.0, 5.0]]), 1, 6)
    (scores,) = scores_of(Magnitude(1), program, Block())
    assert scores.flatten().tolist() == [1.0, 4.0]


def test_other_norms_are_refused():
    with pytest.raises(PassError, match=r"^score magnitude: norm must be 1 or 2, not 3$"):
        Magnitude(3)  # type: ignore[arg-type]  # the mistake
