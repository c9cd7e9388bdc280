"""``graphopt compile``, and Ctrl-C in the middle of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt.models import InputSpec, read_program
from tests.cli.conftest import Cli

SHAPE = ("--input-shape", "1x3x16x16", "--threads", "1")


def test_compiled_model_equals_pytorch(cli: Cli, nets: str) -> None:
    report = json.loads(cli("compile", f"{nets}:tiny", *SHAPE, "-o", "t.gopt", "--json").stdout)
    assert report["bytes"] == Path("t.gopt").stat().st_size
    assert report["threads"] == 1
    assert report["kernels"] > 0
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save("x.npy", x.numpy())
    cli("run", "t.gopt", "-i", "x.npy", "-o", "y.npy")
    want = read_program(f"{nets}:tiny", [InputSpec((1, 3, 16, 16))])(x).detach().numpy()
    # Sums of at most 27 + 256 float32 products in another order, on values below 1.
    assert np.abs(np.load("y.npy") - want).max() < 1e-5


def test_compressed_program_compiles_to_the_same_file_as_inline(cli: Cli, nets: str) -> None:
    quantized = ("--pass", "quantize", "--calibration", f"{nets}:batches")
    cli("compress", f"{nets}:tiny", *SHAPE[:2], *quantized, "-o", "q.pt2")
    cli("compile", "q.pt2", "--trust", "--threads", "1", "-o", "q.gopt")
    cli("compile", f"{nets}:tiny", *SHAPE, *quantized, "-o", "inline.gopt")
    x = torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    for index, image in enumerate(x):
        np.save("x.npy", image)
        for name in ("q", "inline"):
            cli("run", f"{name}.gopt", "-i", "x.npy", "-o", f"{name}{index}.npy")
        assert np.array_equal(np.load(f"q{index}.npy"), np.load(f"inline{index}.npy"))
    report = json.loads(cli("inspect", "q.gopt", "--json").stdout)
    assert "quantize" in [record["pass"] for record in report["history"]]
    assert "int8" in {kernel["dtype"] for kernel in report["kernels"]}
    images = "images: together: the batch is of one image\n"
    assert images in cli("inspect", "q.gopt").stdout
    assert report["report"]["images"] == images.partition(": ")[2].strip()


def test_precision(cli: Cli, nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.cuda.build.find_nvcc", lambda: None)
    options = ("--target", "t4", "--precision", "float16", "-o", "h.gopt")
    assert (
        cli("compile", f"{nets}:tiny", *SHAPE, *options)
        .stdout.splitlines()[0]
        .endswith("1 thread(s), floats in float16")
    )
    assert "floats: float16\n" in cli("inspect", "h.gopt").stdout
    report = json.loads(cli("inspect", "h.gopt", "--json").stdout)
    assert report["input_types"] == {"x": "float32 [1, 3, 16, 16]"}
    assert {kernel["form"] for kernel in report["kernels"] if kernel["macs"]} == {"mma f16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "no/such/t.gopt"], "no/such/t.gopt cannot be written: No such file or directory"),
        (["-o", "t.gopt", "--target", "avx3"], "unknown target 'avx3': did you mean 'avx2'? "),
        (["-o", "t.gopt", "--plugin", "absent.py"], "plugin absent.py is not a file"),
        (
            ["-o", "t.gopt", "--target", "avx2", "--precision", "tf32"],
            "option precision: target avx2 computes floats in float32, not in tf32; "
            "leave the option out, or compile for a GPU",
        ),
    ],
)
def test_bad_options_are_found_before_the_work(
    cli: Cli, nets: str, arguments: list[str], message: str
) -> None:
    stderr = cli("compile", f"{nets}:tiny", *SHAPE, *arguments, code=1).stderr
    assert stderr.startswith(f"Error: {message}")
    assert "capturing" not in stderr
    assert not Path("t.gopt").exists()


def test_usage_errors(cli: Cli, nets: str) -> None:
    assert "--output" in cli("compile", f"{nets}:tiny", *SHAPE, code=2).stderr
    model = (f"{nets}:tiny", *SHAPE[:2])
    stderr = cli("compile", *model, "-o", "t.so", code=2).stderr
    assert stderr == "Error: --output t.so must end in .gopt\n"
    assert "--threads" in cli("compile", *model, "--threads", "0", "-o", "t.gopt", code=2).stderr


@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_interrupt_leaves_the_old_file(nets: str, folder: Path, delay: float) -> None:
    Path("t.gopt").write_bytes(b"the old one")
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt.cli", "compile", f"{nets}:tiny", *SHAPE, "-o", "t.gopt"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("compiling"):
            break
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, (lines, rest)
    assert rest.endswith("Error: interrupted; nothing was written\n")
    assert Path("t.gopt").read_bytes() == b"the old one"
    assert {path.name for path in folder.iterdir()} <= before
