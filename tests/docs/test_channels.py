"""Runs docs/channels.md: every Python block, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.passes.prune.channels import walk

PAGE = (Path(__file__).parents[2] / "docs" / "channels.md").read_text(encoding="utf-8")


def test_every_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "RULES", walk.RULES.copy())  # the page adds a rule
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    namespace = {"__name__": "channels"}
    for number, source in enumerate(blocks, start=1):
        exec(compile(source, f"channels.md, block {number}", "exec", dont_inherit=True), namespace)
