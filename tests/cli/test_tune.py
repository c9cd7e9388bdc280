"""``graphopt tune`` and ``graphopt compile --tune``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SHAPE = ("--input-shape", "1x3x16x16", "--threads", "1", "--target", "x86-64")


def test_tunes_and_compiles_with_what_was_found(cli: Cli, nets: str) -> None:
    model = (f"{nets}:tiny", *SHAPE)
    report = json.loads(
        cli("tune", *model, "--budget", "3s", "--store", "t.sqlite", "--json").stdout
    )
    assert [layer["layers"] for layer in report["layers"]] == [["conv, relu"], ["head"]]
    assert report["outcomes"]["measured"] == sum(layer["trials"] for layer in report["layers"])
    table = cli("tune", *model, "--budget", "1s", "--store", "t.sqlite").stdout
    for word in ("cost model", "tuned, us", "ratio", "float32 16x16x3 -> 8, 3x3", "geometric mean"):
        assert word in table
    summary = json.loads(
        cli("compile", *model, "--tuning", "t.sqlite", "-o", "t.gopt", "--json").stdout
    )
    assert set(summary["report"]["tuning"]) == {"geometric_mean", "layers"}
    cli("compile", *model, "--tune", "1s", "--tuning", "t.sqlite", "-o", "u.gopt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--budget", "soon"], "the tuning budget 'soon' is no time; write 30s, 5m or 1h"),
        (["tune", "--rpc", "9190", "--key", "a"], "the RPC tracker '9190' must look like"),
        (["compile", "--tune", "soon", "-o", "t.gopt"], "the tuning budget 'soon' is no time"),
        (["compile", "--rpc", "a:1", "-o", "t.gopt"], "tuning over RPC needs the device's key"),
    ],
)
def test_bad_options_are_found_before_the_work(
    cli: Cli, nets: str, arguments: list[str], message: str
) -> None:
    stderr = cli(arguments[0], f"{nets}:tiny", *SHAPE, *arguments[1:], code=1).stderr
    assert stderr.startswith(f"Error: {message}")
    assert "capturing" not in stderr


def test_a_missing_store_is_an_error(cli: Cli, nets: str) -> None:
    model = (f"{nets}:tiny", *SHAPE)
    stderr = cli("compile", *model, "--tuning", "none.sqlite", "-o", "t.gopt", code=1).stderr
    assert "the tuning store none.sqlite does not exist" in stderr


def test_interrupt_keeps_what_was_measured(nets: str, folder: Path) -> None:
    command = [sys.executable, "-m", "graphopt.cli", "tune", f"{nets}:tiny", *SHAPE]
    process = subprocess.Popen(
        [*command, "--budget", "5m", "--store", "t.sqlite", "--json", "--verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    trials = (line for line in process.stderr if line.startswith("tuning: "))
    for _ in range(3):
        next(trials)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.endswith("Error: interrupted; what was measured is in t.sqlite\n")
    report = json.loads(stdout)
    assert report["interrupted"]
    assert report["outcomes"]["measured"] >= 3
