"""``graphopt export``: what it writes and prints, what it refuses, and that nothing is left half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from tests.cli.conftest import Cli

FILES = ["CMakeLists.txt", "README.md", "main.c", "net.c", "net.h", "net.weights", "net_kernels.o"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for a machine that this one may not be."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
    artifact = go.compile(go.capture(model, (torch.zeros(1, 8),)), target="avx2", threads=1)
    return artifact.save(tmp_path_factory.mktemp("saved") / "Net.gopt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_and_its_files_listed(cli: Cli, folder: Path, saved: Path):
    result = cli("export", "--c", "out", saved)
    assert names(folder / "out") == FILES
    assert "net_kernels.o" in result.stdout
    assert "for one thread" in result.stdout


def test_json_says_the_same(cli: Cli, folder: Path, saved: Path):
    result = cli("export", saved, "--c", "out", "--name", "other", "--json")
    body = json.loads(result.stdout)
    assert body["name"] == "other"
    assert body["files"] == {p.name: p.stat().st_size for p in (folder / "out").iterdir()}
    assert body["memory"] > 0


def test_an_empty_folder_is_filled_and_another_needs_force(cli: Cli, folder: Path, saved: Path):
    (folder / "out").mkdir()
    cli("export", saved, "--c", "out/")
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "net.h").write_text("changed")
    result = cli("export", saved, "--c", "out", code=1)
    assert result.stderr == (
        "Error: out is not empty; name another folder, or use --force to replace the files in it\n"
    )
    cli("export", saved, "--c", "out", "--force")
    assert names(folder / "out") == sorted([*FILES, "notes.txt"])
    assert "net_create" in (folder / "out" / "net.h").read_text()
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_wrong_arguments(cli: Cli, folder: Path, saved: Path):
    assert "name the folder to write: --c FOLDER" in cli("export", saved, code=2).stderr
    cli("export", code=2)
    (folder / "file").write_text("x")
    for place, message in (
        ("file", "file is a file; name a folder"),
        ("no/where", "no/where cannot be made: "),
    ):
        assert message in cli("export", saved, "--c", place, code=1).stderr
    wrong = cli("export", saved, "--c", "out", "--name", "Not C", code=1)
    assert "the name 'Not C' cannot be a prefix of C functions" in wrong.stderr
    assert not (folder / "out").exists()


def test_a_broken_or_absent_file_is_refused(cli: Cli, folder: Path, saved: Path):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "broken.gopt").write_bytes(data)
    assert "broken.gopt is refused: " in cli("export", "broken.gopt", "--c", "out", code=1).stderr
    assert "cannot be read" in cli("export", "absent.gopt", "--c", "out", code=1).stderr
    assert names(folder) == ["broken.gopt", "plugin.py"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(
    cli: Cli,
    folder: Path,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    there: bool,
):
    if there:
        (folder / "out").mkdir()
        (folder / "out" / "net.h").write_text("old")
    written = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        if path.name.endswith(".weights"):
            written(path, data[:10])
            raise error
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    interrupted = isinstance(error, KeyboardInterrupt)
    result = cli("export", saved, "--c", "out", "--force", code=130 if interrupted else 1)
    if not interrupted:
        assert result.stderr == "Error: out cannot be written: No space left on device\n"
    assert names(folder) == (["out"] if there else []) + ["plugin.py"]
    if there:
        assert (folder / "out" / "net.h").read_text() == "old"
        assert names(folder / "out") == ["net.h"]


def test_it_needs_neither_torch_nor_tvm(folder: Path, saved: Path):
    code = (
        "import sys\nfrom graphopt.artifact import read_artifact\nfrom graphopt.export import export_c\n"
        "export_c(read_artifact(sys.argv[1], any_cpu=True), 'out', 'net')\n"
        "print(sorted({'torch', 'tvm', 'tvm_ffi'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(go.__file__).parent.parent)},
    )
    assert done.stdout == "[]\n"


def test_the_help_names_an_example(cli: Cli):
    text = cli("export", "--help").stdout
    assert "--c" in text
    assert "--force" in text
    assert "graphopt export tiny.gopt --c tiny/" in text
