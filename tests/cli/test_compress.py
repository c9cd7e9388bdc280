"""``graphopt compress``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt.models import read_program
from tests.cli.conftest import Cli

SHAPE = ("--input-shape", "1x3x16x16")
PLUGIN = ("--plugin", "plugin.py")


def test_program_is_saved_with_its_history(cli: Cli, nets: str, folder: Path) -> None:
    cli("compress", f"{nets}:tiny", *SHAPE, *PLUGIN, "--pass", "plugin-pass", "-o", "out.pt2")
    program = read_program("out.pt2", trust=True)
    assert [record.name for record in program.history] == ["plugin-pass"]
    x = torch.ones(1, 3, 16, 16)
    assert torch.equal(program(x), read_program(f"{nets}:tiny", program_specs())(x))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def program_specs():
    from graphopt.models import InputSpec

    return [InputSpec.parse("1x3x16x16")]


def test_saved_program_comes_back_into_compress(cli: Cli, nets: str) -> None:
    options = (*SHAPE, "--dynamic-batch", "1:4")
    cli("compress", f"{nets}:tiny", *options, "-o", "once.pt2")
    cli("compress", "once.pt2", "--trust", *PLUGIN, "--pass", "plugin-pass", "-o", "twice.pt2")
    program = read_program("twice.pt2", trust=True)
    assert program.dynamic_batch == (1, 4)
    assert program(torch.zeros(3, 3, 16, 16)).shape == (3, 5)


def test_json_holds_history_and_stats(cli: Cli, nets: str) -> None:
    result = cli(
        "compress",
        f"{nets}:tiny",
        *SHAPE,
        *PLUGIN,
        "--pass",
        "plugin-pass:bits=4,axes=[1,2]",
        "--json",
    )
    report = json.loads(result.stdout)
    (record,) = report["history"]
    assert record["pass"] == "plugin-pass"
    assert record["options"]["bits"] == 4
    assert record["options"]["axes"] == [1, 2]
    assert report["stats"]["parameters"] == 3 * 8 * 9 + 8 + 8 * 5 + 5
    assert report["output"] is None


def test_recipe_and_passes_in_order(cli: Cli, nets: str, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("passes:\n  - plugin-pass: {bits: 2}\n")
    options = (*SHAPE, *PLUGIN, "--recipe", "recipe.yaml", "--pass", "plugin-pass:bits=3")
    report = json.loads(cli("compress", f"{nets}:tiny", *options, "--json").stdout)
    assert [record["options"]["bits"] for record in report["history"]] == [2, 3]


def test_explain_shows_declines(cli: Cli, nets: str) -> None:
    options = (*SHAPE, *PLUGIN, "--pass", "plugin-pass")
    assert (
        "a test pass never rewrites"
        in cli("compress", f"{nets}:tiny", *options, "--explain").stdout
    )
    text = cli("compress", f"{nets}:tiny", *options).stdout
    assert "a test pass never rewrites" not in text
    assert "1 place(s) declined; --explain says why" in text


def test_explain_shows_changed_layers(cli: Cli, nets: str) -> None:
    options = (*SHAPE, *PLUGIN, "--pass", "plugin-halve")
    text = cli("compress", f"{nets}:tiny", *options).stdout
    assert "1 layer(s) changed; --explain lists them" in text
    assert "halved" not in text
    text = cli("compress", f"{nets}:tiny", *options, "--explain", "-o", "halved.pt2").stdout
    (row,) = (line for line in text.splitlines() if "halved" in line)
    cells = [cell.strip() for cell in row.strip("│┃| ").split("│")]
    assert cells == ["plugin-halve", "head", "halved", "40", "41", "40", "42", "0.5"]
    text = cli("inspect", "halved.pt2", "--trust").stdout
    assert [line for line in text.splitlines() if "halved" in line and "head" in line] == [row]


def test_calibration_from_a_factory_an_npz_and_images(cli: Cli, nets: str, folder: Path) -> None:
    from PIL import Image

    np.savez(folder / "data.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photos" / "red.png")
    for source in (f"{nets}:batches", "data.npz", "photos"):
        options = (*SHAPE, *PLUGIN, "--pass", "plugin-pass", "--calibration", source)
        report = json.loads(cli("compress", f"{nets}:tiny", *options, "--json").stdout)
        assert report["history"][0]["options"]["calibration"]


def test_labelled_data_from_a_factory_and_an_npz(cli: Cli, nets: str, folder: Path) -> None:
    labels = np.array([1, 2, 3, 4])
    np.savez(folder / "data.npz", x=np.ones((4, 3, 16, 16), np.float32), labels=labels)
    for source in (f"{nets}:labelled", "data.npz"):
        options = (
            *SHAPE,
            "--pass",
            "prune:score=taylor,schedule={per-layer: 0.5}",
            "--data",
            source,
        )
        report = json.loads(cli("compress", f"{nets}:tiny", *options, "--json").stdout)
        (record,) = report["history"]
        assert record["rewrites"] == 2
        assert record["options"]["score"] == {"taylor": {"squared": False}}
        assert report["stats"]["nonzero"] < 0.6 * report["stats"]["parameters"]


def test_the_model_as_it_came_teaches(cli: Cli, nets: str) -> None:
    passes = ("--pass", "prune:schedule={global: 0.5}", "--pass", "distill:learning_rate=0.1")
    options = (*SHAPE, *passes, "--data", f"{nets}:labelled", "--json")
    _, taught = json.loads(cli("compress", f"{nets}:tiny", *options).stdout)["history"]
    assert taught["rewrites"] > 0
    assert taught["options"]["teacher"] == "<Program>"
    assert taught["error"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "model 'x' must be package.module:factory, a .pt2 or a pickled module (.pt, .pth)"),
        (["{nets}:absent", *SHAPE], "'{nets}:absent': {nets} has no 'absent'"),
        (["{nets}:broken", *SHAPE], "'{nets}:broken' failed: RuntimeError: no weights here"),
        (["{nets}:number", *SHAPE], "'{nets}:number' gives int, not a torch.nn.Module"),
        (
            ["{nets}:tiny"],
            "model '{nets}:tiny' needs the shape of each input, as in --input-shape 1x3x224x224",
        ),
        (
            ["{nets}:tiny", "--input-shape", "1xax3"],
            "input shape '1xax3' must look like 1x3x224x224 or, with a dtype, 1x128:int64",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--dynamic-batch", "8"],
            "--dynamic-batch '8' must look like 1:8",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "nonsense-pass", *PLUGIN],
            "--pass nonsense-pass:1: no pass is called 'nonsense-pass'; did you mean ",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "plugin-pass:bits", *PLUGIN],
            "--pass plugin-pass:bits: 'bits' must look like option=value",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "plugin-pass:bites=4", *PLUGIN],
            "--pass plugin-pass:bites=4:1: plugin-pass has no option 'bites'; its options: calibration, bits, axes",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--calibration", "{nets}:batches"],
            "--calibration was given and no pass takes calibration data",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "fold-batch-norm", "--data", "{nets}:labelled"],
            "--data was given and no pass takes labelled data",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "prune", "--data", "photos"],
            "data 'photos' must be a .npz file or package.module:factory",
        ),
        (
            ["{nets}:tiny", *SHAPE, "--pass", "prune", "--data", "bare.npz"],
            "bare.npz has no array 'labels'; it holds x",
        ),
        (["{nets}:tiny", *SHAPE, "--calibration", "absent.npz"], "input file absent.npz does not exist"),
        (["{nets}:tiny", *SHAPE, "--recipe", "no.yaml"], "recipe no.yaml cannot be read: No such file or directory"),
        (["absent.pt2", "--trust"], "model file absent.pt2 does not exist"),
        (
            ["plugin.pt2"],
            "plugin.pt2 can run code when it is read; add --trust (trust=True) if you know where it comes from",
        ),
        (
            ["plugin.pt2", "--trust"],
            "plugin.pt2 is no ExportedProgram that this torch reads: ",
        ),
        (["{nets}:tiny", *SHAPE, "-o", "no/such/out.pt2"], "no/such/out.pt2 cannot be written: No such file or directory"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    cli: Cli, nets: str, folder: Path, arguments: list[str], message: str
) -> None:
    (folder / "plugin.pt2").write_bytes(b"no archive")
    np.savez(folder / "bare.npz", x=np.zeros((1, 3, 16, 16), np.float32))
    stderr = cli("compress", *(a.format(nets=nets) for a in arguments), code=1).stderr
    assert stderr.splitlines()[-1].startswith("Error: " + message.format(nets=nets))
    assert "Traceback" not in stderr


def test_output_is_refused_before_the_work(cli: Cli, nets: str) -> None:
    result = cli("compress", f"{nets}:tiny", *SHAPE, "-o", "no/such/out.pt2", code=1)
    assert "capturing" not in result.stderr


def test_output_of_another_kind_is_a_usage_error(cli: Cli, nets: str) -> None:
    stderr = cli("compress", f"{nets}:tiny", *SHAPE, "-o", "out.onnx", code=2).stderr
    assert stderr == "Error: --output out.onnx must end in .pt2\n"


def test_a_model_without_a_shape_is_no_model(cli: Cli) -> None:
    assert "Missing argument" in cli("compress", code=2).stderr
