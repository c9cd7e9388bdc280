"""Help, usage errors, exit codes, and what is not imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

COMMANDS = ("compress", "compile", "run", "bench", "inspect", "passes", "targets", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(cli: Cli, command: str) -> None:
    text = cli(command, "--help").stdout
    assert f"graphopt {command}" in text.replace(f"graphopt {command} [OPTIONS]", "")
    assert "--json" in text
    assert "--verbose" in text


def test_help_lists_the_commands(cli: Cli) -> None:
    text = cli("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_version(cli: Cli) -> None:
    import graphopt

    assert cli("--version").stdout == f"graphopt {graphopt.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_a_usage_error(cli: Cli, command: str) -> None:
    assert "--nonsense" in cli(command, "--nonsense", code=2).stderr


def test_unknown_command_is_a_usage_error(cli: Cli) -> None:
    assert "No such command" in cli("frobnicate", code=2).stderr


def test_help_imports_neither_torch_nor_tvm() -> None:
    code = (
        "import sys\n"
        "from graphopt.cli.app import app\n"
        "try:\n    app(['compress', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'tvm', 'tvm_ffi', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


def test_error_is_one_sentence_without_traceback(cli: Cli) -> None:
    result = cli("inspect", "absent.gopt", code=1)
    assert result.stderr == "Error: absent.gopt cannot be read: No such file or directory\n"
    assert result.stdout == ""


def test_verbose_shows_the_traceback(cli: Cli) -> None:
    result = cli("inspect", "absent.gopt", "--verbose", code=1)
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: absent.gopt cannot be read: No such file or directory\n")


def test_module_runs_as_a_program(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli", "targets", "--json"], capture_output=True, check=True
    )
    assert done.stdout.startswith(b"[")
