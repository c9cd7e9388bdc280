"""3 x 3 layers through the whole compiler by Winograd's F(4, 3): chosen, exact, and small in the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.artifact import Artifact
from graphopt.errors import ArtifactError

SIZE, CHANNELS = 24, 64


def _program() -> tuple[go.Program, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]
    x = torch.randn(1, 16, SIZE, SIZE)
    program: go.Program = go.capture(nn.Sequential(*layers).eval(), (x,))
    return program, x


@pytest.fixture(scope="module")
def integer() -> Artifact:
    program, x = _program()
    return go.compile(go.passes.Quantize(calibration=[x])(program), threads=1)


def _is_winograd(artifact: Artifact) -> bool:
    return any(kernel.name.startswith("winograd_") for kernel in artifact.manifest.kernels)


def test_integers_are_the_programs_own(integer: Artifact, tmp_path: Path) -> None:
    _, x = _program()
    assert _is_winograd(integer)
    with torch.no_grad():
        expected = integer.program(x).numpy()
    loaded = go.load(integer.save(tmp_path / "m.gopt"))
    np.testing.assert_array_equal(integer.session()(x.numpy()), expected)
    np.testing.assert_array_equal(loaded(x.numpy()), expected)


def test_float_stays_within_winograds_tolerance() -> None:
    """1e-5 of the largest output; the direct form keeps 1e-6."""
    program, x = _program()
    artifact = go.compile(program, threads=1)
    assert _is_winograd(artifact)
    with torch.no_grad():
        expected = program(x).numpy()
    error = np.abs(artifact.session()(x.numpy()) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_the_file_holds_the_taps(integer: Artifact) -> None:
    (transform,) = integer.manifest.weight_transforms
    assert integer.weights[transform.weight].nbytes == 9 * CHANNELS * CHANNELS
    (size,) = transform.result.shape
    assert isinstance(size, int)
    assert 4 * size == 8 * integer.weights[transform.weight].nbytes


def test_a_missing_transform_is_named(integer: Artifact) -> None:
    (transform,) = integer.manifest.weight_transforms
    renamed = dataclasses.replace(transform, function="absent")
    manifest = dataclasses.replace(integer.manifest, weight_transforms=(renamed,))
    with pytest.raises(ArtifactError) as error:
        Artifact(manifest, integer.library, integer.weights).session()
    assert str(error.value) == (
        "the weight transform 'absent' is not in model.so; compile the model again"
    )
