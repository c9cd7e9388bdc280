"""Random networks, quantized and in float: compiled code against the programs in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

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

QUICK, ALL = 20, 300


def _check_int8(seed: int, targets: Sequence[str]) -> None:
    """Bit for bit; where float islands stand inside, up to their own rounding (which may tip a later quantize)."""
    model, x = random_model(seed)
    program = quantized(model, (x,))
    for target in targets:
        artifact = compiled(program, target)
        got, want = run(artifact, (x,)), reference(artifact.program, (x,))
        if not float_islands(artifact.program):
            assert_bit_equal(got, want)
            continue
        for ours, defined in zip(got, want, strict=True):
            scale = max(1e-3, float(np.abs(defined).max()))
            assert np.median(np.abs(ours - defined)) <= 1e-5 * scale
            assert np.abs(ours - defined).max() <= 0.1 * scale


def _check_float(seed: int, target: str) -> None:
    """float32 sums in another order: 1e-5 of the largest output, 100 roundings of 6e-8 and some head room."""
    model, x = random_model(1000 + seed)
    artifact = compiled(go.capture(model, (x,)), target)
    (ours,) = run(artifact, (x,))
    eager = model(x).detach().numpy()
    bound = 1e-5 * max(1.0, float(np.abs(eager).max()))
    np.testing.assert_allclose(ours, eager, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", range(QUICK))
def test_int8_equals_the_integer_program(seed: int) -> None:
    _check_int8(seed, [RUNNABLE[seed % len(RUNNABLE)]])


@pytest.mark.parametrize("seed", range(QUICK))
def test_float_equals_eager(seed: int) -> None:
    _check_float(seed, RUNNABLE[seed % len(RUNNABLE)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ALL))
def test_int8_on_every_row(seed: int) -> None:
    _check_int8(seed, RUNNABLE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, ALL))
def test_float_on_a_row(seed: int) -> None:
    _check_float(seed, RUNNABLE[seed % len(RUNNABLE)])
