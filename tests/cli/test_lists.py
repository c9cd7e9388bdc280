"""``graphopt passes`` and ``graphopt targets``."""

from __future__ import annotations

import json
from pathlib import Path

from graphopt.backends.targets import TARGETS
from graphopt.registry import all_passes
from tests.cli.conftest import Cli


def test_passes_json_describes_every_pass(cli: Cli) -> None:
    entries = json.loads(cli("passes", "--json").stdout)
    assert [entry["name"] for entry in entries] == list(all_passes())
    assert all(entry["summary"] and entry["contract"] for entry in entries)


def test_options_of_a_plugin_with_types_and_defaults(cli: Cli) -> None:
    entries = json.loads(cli("passes", "--plugin", "plugin.py", "--json").stdout)
    (entry,) = [entry for entry in entries if entry["name"] == "plugin-pass"]
    assert entry["contract"] == "exact"
    assert entry["summary"] == "``relu(x) -> x``, if it dared."
    assert entry["options"] == [
        {"name": "calibration", "type": "Any", "default": None},
        {"name": "bits", "type": "int", "default": 8},
        {"name": "axes", "type": "tuple[int, ...]", "default": "()"},
    ]


def test_table_of_passes_names_the_options(cli: Cli) -> None:
    text = cli("passes", "--plugin", "plugin.py").stdout
    assert "plugin-pass" in text
    assert "bits: int = 8" in text


def test_missing_plugin(cli: Cli) -> None:
    stderr = cli("passes", "--plugin", "absent.py", code=1).stderr
    assert stderr == "Error: plugin absent.py is not a file\n"


def test_plugin_that_fails(cli: Cli, folder: Path) -> None:
    (folder / "bad.py").write_text("1 / 0\n")
    stderr = cli("passes", "--plugin", "bad.py", code=1).stderr
    assert stderr == ("Error: plugin bad.py failed to load: ZeroDivisionError: division by zero\n")


def test_targets_json(cli: Cli) -> None:
    rows = json.loads(cli("targets", "--json").stdout)
    assert [row["name"] for row in rows] == list(TARGETS)
    for row in rows:
        target = TARGETS[row["name"]]
        assert row["runs_here"] == target.runs_here()
        assert row["missing"] == list(target.missing())
        assert row["features"] == sorted(target.features)
        assert row["verified"] == target.verified
        assert row["kernels"] == list(target.kernels)
    assert sum(row["native"] for row in rows) <= 1


def test_targets_table(cli: Cli) -> None:
    text = cli("targets").stdout
    assert all(name in text for name in TARGETS)
    assert "all but sparse" in text
    assert "emulated" in text
    assert "asimdrdm" in text
