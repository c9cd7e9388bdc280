"""Runs docs/writing-a-pass.md: every Python block, in order, in one namespace."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphopt as go
from graphopt import registry
from tests.passes.helpers import captured, operators

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))


def test_every_block_runs() -> None:
    torch.manual_seed(0)
    namespace = {"__name__": "writing_a_pass", "yaml_blocks": blocks("yaml")}
    sources = blocks("python")
    assert len(sources) == 8
    for number, source in enumerate(sources, start=1):
        code = compile(source, f"{PAGE.name}, block {number}", "exec", dont_inherit=True)
        exec(code, namespace)


def test_a_users_pass_takes_fifteen_lines() -> None:
    source = "\n".join(blocks("python")[1:3])
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_passes_work_as_a_plugin_file(tmp_path: Path) -> None:
    plugin = tmp_path / "my_passes.py"
    plugin.write_text("".join(blocks("python")[:3]), encoding="utf-8")
    registry.load_plugin(plugin)
    pipeline = go.Pipeline.from_text("passes: [approximate-gelu]")
    program = captured(torch.nn.functional.gelu, torch.randn(4))
    assert operators(pipeline(program)) == ["mul", "sigmoid", "mul"]


def test_the_command_line_lists_a_plugins_passes(tmp_path: Path) -> None:
    plugin = tmp_path / "my_passes.py"
    plugin.write_text("".join(blocks("python")[:3]), encoding="utf-8")
    command = [sys.executable, "-m", "graphopt.cli", "passes", "--plugin", str(plugin)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "approximate-gelu" in shown.stdout
