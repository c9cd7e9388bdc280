"""Whole networks as C: the bytes of the session on this machine, those of the definition under qemu, and what they weigh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.artifact import Artifact
from graphopt.demo.network import load
from graphopt.torchvision_import import torchvision_models
from tests.export import support
from tests.export.support import Logits, build, compiled, example, exported, seeded
from tests.models import randomize

pytestmark = pytest.mark.slow


def network(name: str, integer: bool, **options: Any) -> tuple[Artifact, torch.Tensor]:
    """The network with seeded weights, or the demo's own."""
    x = example(1, 3, 224, 224)
    if name == "efficientnet_lite0":
        model = load()
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = randomize(torchvision_models().get_model(name, weights=None))
    return compiled(model, (x,), integer=integer, **options), x


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2", "resnet18"])
@pytest.mark.parametrize("integer", [True, False])
def test_the_bytes_are_those_of_the_session(tmp_path: Path, name: str, integer: bool):
    artifact, x = network(name, integer, threads=2)
    folder = exported(artifact, tmp_path / name)
    build(folder)
    want = support.wanted(artifact, [x.numpy()])
    for threads in (1, 2):
        assert support.run(folder, artifact, [x.numpy()], threads) == want


@pytest.mark.parametrize("integer", [True, False])
def test_resnet18_weighs_less_than_a_megabyte_beyond_its_weights(tmp_path: Path, integer: bool):
    artifact, _ = network("resnet18", integer, threads=1)
    folder = exported(artifact, tmp_path / "resnet18")
    library = build(folder, "-s", "-shared", output="libresnet18.so")
    assert library.stat().st_size < 500e3
    written = sum(
        path.stat().st_size for path in folder.iterdir() if path.suffix in (".h", ".c", ".o")
    )
    assert written < 1e6


@pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or shutil.which("aarch64-linux-gnu-gcc") is None,
    reason="qemu-user or gcc-aarch64-linux-gnu is not installed",
)
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2", "resnet18"])
def test_arm_gives_the_bytes_of_the_definition(tmp_path: Path, name: str):
    artifact, x = network(name, True, target="raspberry-pi-5", threads=2)
    folder = exported(artifact, tmp_path / name)
    build(folder, "-static", cc="aarch64-linux-gnu-gcc")
    want = artifact.program(x).detach().numpy().tobytes()
    runner = ("qemu-aarch64", "-cpu", "cortex-a76")
    assert support.run(folder, artifact, [x.numpy()], 2, runner) == [want]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"], ids=["addresses", "threads"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str):
    artifact = compiled(seeded(Logits), (example(1, 3, 32, 32),), integer=True, threads=2)
    folder = exported(artifact, tmp_path / "net")
    build(folder, "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    x = example(1, 3, 32, 32).numpy()
    assert support.run(folder, artifact, [x], 2) == support.wanted(artifact, [x])


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing(tmp_path: Path):
    """For AVX2, the widest that valgrind knows; the file's own checks run under it too."""
    x = example(1, 3, 32, 32)
    artifact = compiled(seeded(Logits), (x,), integer=True, target="avx2", threads=2)
    folder = exported(artifact, tmp_path / "net")
    build(folder)
    options = ("--error-exitcode=9", "--leak-check=full", "--quiet")
    made = support.run(folder, artifact, [x.numpy()], 2, ("valgrind", *options))
    assert made == [artifact.program(x).detach().numpy().tobytes()]
