"""Random networks as C: the bytes of the session, or a refusal that names an operator."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphopt as go
from tests.end_to_end.support import compiled, quantized
from tests.export import support
from tests.export.support import build, exported
from tests.random_graphs import random_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_bytes_are_those_of_the_session(tmp_path: Path, seed: int, integer: bool):
    model, x = random_model(500 + seed)
    program = quantized(model, (x,)) if integer else go.capture(model, (x,))
    artifact = compiled(program, "native")
    assert not artifact.manifest.line.refused
    folder = exported(artifact, tmp_path / "net")
    build(folder)
    for threads in (1, 2):
        made = support.run(folder, artifact, [x.numpy()], threads)
        assert made == support.wanted(artifact, [x.numpy()])
