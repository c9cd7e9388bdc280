"""``graphopt run``, ``bench`` and ``inspect`` on a small artifact that TVM compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt.manifest import Dim, TensorSpec
from tests import compiled
from tests.cli.conftest import Cli


@pytest.fixture
def model(folder: Path) -> Path:
    """``(relu(x W + b), x W, x, b)`` of a batch of 1 to 8."""
    compiled.artifact().save("model.gopt")
    return Path("model.gopt")


@pytest.fixture
def single(folder: Path) -> Path:
    """``relu(x W + b)`` alone."""
    compiled.artifact(structure=0).save("single.gopt")
    return Path("single.gopt")


def test_run_writes_npy(cli: Cli, single: Path) -> None:
    np.save("x.npy", compiled.inputs())
    text = cli("run", single, "--input", "x.npy", "-o", "y.npy").stdout
    assert np.array_equal(np.load("y.npy"), compiled.expected(compiled.inputs())[0])
    assert "written to y.npy" in text


def test_run_writes_every_output_to_npz(cli: Cli, model: Path) -> None:
    np.savez("x.npz", x=compiled.inputs())
    cli("run", model, "--input", "x.npz", "-o", "y.npz")
    with np.load("y.npz") as outputs:
        assert list(outputs) == ["output0", "output1", "output2", "output3"]
        assert compiled.same(
            [outputs["output0"], outputs["output1"]], compiled.expected(compiled.inputs())
        )


def test_run_prints_the_largest(cli: Cli, single: Path) -> None:
    np.save("x.npy", compiled.inputs(1))
    result = cli("run", single, "-i", "x=x.npy", "--top", "3", "--json")
    (output,) = json.loads(result.stdout)["outputs"]
    values = compiled.expected(compiled.inputs(1))[0][0]
    best = (-values).argsort(kind="stable")[:3]
    assert output["shape"] == [1, compiled.OUTPUTS]
    assert output["top"] == [{"row": 0, "index": int(i), "value": float(values[i])} for i in best]
    assert str(best[0]) in cli("run", single, "-i", "x.npy", "--top", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "absent.npy"], "input file absent.npy does not exist"),
        (["-i", "junk.npy"], "junk.npy is no .npy or .npz of plain arrays"),
        (["-i", "pickled.npy"], "pickled.npy is no .npy or .npz of plain arrays"),
        (["-i", "x.npy", "-i", "x.npy"], "x.npy: the model's inputs are x, each given once"),
        (["-i", "wide.npy"], "argument 'x' has shape [3, 63]; it must be float32 [batch in 1..8, 64]"),
        (["-i", "junk.png"], "image junk.png fits an input of batch x 3 (or 1) x height x width, not [1, 64]"),
        (["-i", "x.npy", "-o", "y.npy"], "the model has 4 outputs; write them to a .npz"),
        (["-i", "x.npy", "-o", "no/such/y.npz"], "no/such/y.npz cannot be written: No such file or directory"),
        (["-i", "x.npy", "--image-std", "1,x"], "--image-std '1,x' must be numbers between commas"),
    ],
)  # fmt: skip
def test_run_with_bad_input(cli: Cli, model: Path, arguments: list[str], message: str) -> None:
    np.save("x.npy", compiled.inputs())
    np.save("wide.npy", compiled.inputs()[:, :63])
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    Path("junk.npy").write_bytes(b"\x93NUMPY junk")
    Path("junk.png").write_bytes(b"junk")
    assert cli("run", model, *arguments, code=1).stderr == f"Error: {message}\n"
    assert not list(Path().glob("y*"))


def test_run_needs_an_input(cli: Cli, model: Path) -> None:
    assert "--input" in cli("run", model, code=2).stderr


def test_image_is_resized_and_normalized(folder: Path) -> None:
    from PIL import Image

    from graphopt.cli.images import Normalization, read_image

    Image.new("RGB", (60, 40), (255, 0, 51)).save("flat.png")
    normal = Normalization((0.5, 0.5, 0.2), (0.5, 0.25, 1.0))
    image = read_image(Path("flat.png"), (1, 3, 16, 24), normal)
    assert image.shape == (3, 16, 24)
    assert image.dtype == np.float32
    # A flat image stays flat under any resize; 51 / 255 is 0.2 to half an ulp of float32.
    assert np.abs(image - np.array([1.0, -2.0, 0.0]).reshape(3, 1, 1)).max() < 1e-6


def test_inspect_json_is_the_manifest(cli: Cli, model: Path) -> None:
    report = json.loads(cli("inspect", model, "--json").stdout)
    manifest = compiled.manifest()
    assert report["target"] == manifest.target
    assert report["features"] == list(manifest.features)
    assert [kernel["name"] for kernel in report["kernels"]] == ["matmul", "add", "relu"]
    assert report["input_types"] == {"x": "float32 [batch in 1..8, 64]"}
    assert report["file"]["bytes"] == model.stat().st_size


def test_inspect_shows_tables(cli: Cli, model: Path) -> None:
    text = cli("inspect", model).stdout
    assert "float32 [batch in 1..8, 64]" in text
    assert "matmul" in text


def test_inspect_a_file_for_another_machine(cli: Cli, folder: Path) -> None:
    compiled.artifact(target="neon", triple="riscv64-linux", features=("zfoo",)).save("other.gopt")
    assert json.loads(cli("inspect", "other.gopt", "--json").stdout)["target"] == "neon"
    np.save("x.npy", compiled.inputs())
    stderr = cli("run", "other.gopt", "-i", "x.npy", code=1).stderr
    assert stderr.startswith(
        "Error: other.gopt is compiled for neon (riscv64) and this machine is "
    )


@pytest.mark.parametrize("command", ["run", "bench", "inspect"])
def test_damaged_file_is_refused(cli: Cli, model: Path, command: str) -> None:
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    Path("bad.gopt").write_bytes(data)
    np.save("x.npy", compiled.inputs())
    arguments = ["-i", "x.npy"] if command == "run" else []
    stderr = cli(command, "bad.gopt", *arguments, code=1).stderr
    assert stderr.startswith("Error: bad.gopt is refused: ")
    assert len(stderr.splitlines()) == 1


def test_inspect_a_program(cli: Cli, nets: str) -> None:
    cli("compress", f"{nets}:tiny", "--input-shape", "1x3x16x16", "-o", "p.pt2")
    assert "can run code" in cli("inspect", "p.pt2", code=1).stderr
    report = json.loads(cli("inspect", "p.pt2", "--trust", "--json").stdout)
    assert report["input_types"] == {"x": "float32 [1, 3, 16, 16]"}
    assert report["stats"]["parameters"] == 3 * 8 * 9 + 8 + 8 * 5 + 5
    assert "conv2d" in cli("inspect", "p.pt2", "--trust").stdout


def test_bench_json(cli: Cli, model: Path) -> None:
    result = cli("bench", model, "--seconds", "0.05", "--kernels", "2", "--json")
    report = json.loads(result.stdout)
    assert report["latency"]["runs"] >= 5
    assert len(report["kernels"]) == 2
    assert report["inputs"] == {"x": "float32 [1, 64]"}
    assert report["comparison"] is None


def test_bench_against_torch(cli: Cli, model: Path, folder: Path) -> None:
    (folder / "linear_of_bench_test.py").write_text(
        f"import torch\ndef linear(): return torch.nn.Linear({compiled.FEATURES}, {compiled.OUTPUTS})\n"
    )
    peers = ("--against", "torch", "--model", "linear_of_bench_test:linear")
    report = json.loads(cli("bench", model, "--seconds", "0.05", *peers, "--json").stdout)
    assert set(report["comparison"]["timings"]) == {"graphopt", "torch"}
    assert report["comparison"]["failures"] == {}
    assert "graphopt" in cli("bench", model, "--seconds", "0.05", *peers).stdout


def test_bench_against_needs_a_model(cli: Cli, model: Path) -> None:
    stderr = cli("bench", model, "--against", "torch", code=2).stderr
    assert stderr == "Error: --against needs --model: the float model that the peers run\n"


def test_bench_with_an_unknown_peer(cli: Cli, model: Path) -> None:
    arguments = ("--against", "tflite", "--model", "json:loads")
    stderr = cli("bench", model, *arguments, code=1).stderr
    assert stderr.startswith("Error: unknown peer 'tflite'; known are torch, ")


def test_inputs_are_made_for_every_dtype() -> None:
    from graphopt.cli.bench import _made_up

    generator = np.random.default_rng(0)
    indices = _made_up(TensorSpec("ids", "int64", (Dim("batch", 2, 8), 5)), generator)
    assert indices.dtype == np.int64
    assert np.array_equal(indices, np.ones((2, 5)))
    assert _made_up(TensorSpec("x", "float32", (4,)), generator).std() > 0
