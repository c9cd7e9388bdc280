"""Random networks, quantized and in float: compiled code against the programs in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

import graphopt as go
from tests.end_to_end.support import (
    RUNNABLE,
    assert_bit_equal,
    compiled,
    float_islands,
    quantized,
    reference,
    run,
)
from tests.random_graphs import random_model

QUICK, ALL = 20, 400


def _slow_after(count: int, total: int) -> list[object]:
    return [
        pytest.param(seed, marks=[] if seed < count else [pytest.mark.slow])
        for seed in range(total)
    ]


@pytest.mark.parametrize("seed", _slow_after(QUICK, ALL))
def test_int8_equals_the_integer_program(seed: int) -> None:
    """Bit for bit; where float islands stand inside, up to their own rounding (which may tip a later quantize)."""
    model, x = random_model(seed)
    artifact = compiled(quantized(model, (x,)), RUNNABLE[seed % len(RUNNABLE)])
    got, want = run(artifact, (x,)), reference(artifact.program, (x,))
    if not float_islands(artifact.program):
        assert_bit_equal(got, want)
        return
    for ours, defined in zip(got, want, strict=True):
        scale = max(1e-3, float(np.abs(defined).max()))
        assert np.median(np.abs(ours - defined)) <= 1e-5 * scale
        assert np.abs(ours - defined).max() <= 0.1 * scale


@pytest.mark.parametrize("seed", _slow_after(QUICK, ALL))
def test_float_equals_eager(seed: int) -> None:
    """float32 sums in another order: 1e-5 of the largest output, 100 roundings of 6e-8 and some head room."""
    model, x = random_model(1000 + seed)
    artifact = compiled(go.capture(model, (x,)), RUNNABLE[seed % len(RUNNABLE)])
    with np.errstate(all="ignore"):
        got, want = run(artifact, (x,)), [model(x).detach().numpy()]
    for ours, eager in zip(got, want, strict=True):
        np.testing.assert_allclose(
            ours, eager, rtol=0, atol=1e-5 * max(1.0, float(np.abs(eager).max()))
        )
