"""``s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3``."""

import pytest

from graphopt.errors import PassError
from graphopt.passes.prune import Global, Gradual, PerLayer

SCHEDULE = Gradual(0.9, initial=0.1, start=5, updates=4, every=10)


@pytest.mark.parametrize(
    ("step", "sparsity"),
    [
        (0, 0.1),
        (5, 0.1),
        (14, 0.1),
        (15, 0.9 - 0.8 * 0.75**3),
        (24, 0.9 - 0.8 * 0.75**3),
        (25, 0.8),  # 0.9 - 0.8 / 8
        (35, 0.8875),  # 0.9 - 0.8 / 64
        (45, 0.9),
        (1000, 0.9),
    ],
)
def test_the_cubic(step, sparsity):
    assert SCHEDULE.at(step) == pytest.approx(sparsity, abs=1e-12)


def test_masks_move_at_the_updates_only():
    assert [step for step in range(100) if SCHEDULE.due(step)] == [5, 15, 25, 35, 45]
    assert SCHEDULE.end == 45


def test_the_scope_shares_it_out():
    assert SCHEDULE.one_shot(45) == Global(0.9)
    assert Gradual(0.9, scope="per-layer").one_shot(0) == PerLayer(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"updates": 0},
            "schedule gradual: start must be at least 0, updates and every at least 1, not 0, 0 and 100",
        ),
        ({"initial": 2.0}, "schedule gradual: initial must be 0 to 1, not 2"),
        (
            {"scope": "layer"},
            "schedule gradual: scope must be global or per-layer, not 'layer'",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(PassError) as caught:
        Gradual(0.5, **options)
    assert str(caught.value) == message
