"""Equal programs give equal bytes, whatever the process; one session serves many threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

import graphopt as go
from tests.end_to_end.support import compiled, quantized

_SCRIPT = """
import sys
from tests.backends.lower.test_determinism import saved
print(saved(sys.argv[1]))
"""


def _program() -> go.Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(size=(5, 5), mode="bilinear"),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
    ).eval()
    image = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return quantized(model, (image,))


def saved(path: str) -> str:
    """SHA-256 of the file that the test's program compiles to."""
    torch.set_num_threads(1)
    compiled(_program(), threads=2).save(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Neither the hash seed nor the folder reaches the file."""
    digests = {saved(str(tmp_path / "here.gopt"))}
    for seed in ("1", "2"):
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path / f"{seed}.gopt")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


def test_four_threads_call_one_session() -> None:
    session = compiled(_program(), threads=2).session()
    generator = np.random.default_rng(0)
    images = [generator.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(8)]
    alone = [session(image) for image in images]

    def turn(first: int) -> bool:
        order = [(first + step) % len(images) for step in range(100)]
        return all(np.array_equal(session(images[i]), alone[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(turn, range(4)))
