"""Runs docs/recover.md: every Python block, in order, in one namespace; its table has every option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from graphopt.train.options import Keywords, Options

PAGE = (Path(__file__).parents[2] / "docs" / "recover.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_runs() -> None:
    namespace: dict[str, Any] = {"yaml_blocks": blocks("yaml")}
    sources = blocks("python")
    assert len(sources) == 6
    for number, source in enumerate(sources, start=1):
        exec(compile(source, f"recover.md, block {number}", "exec"), namespace)


def test_the_table_has_every_option() -> None:
    section = PAGE.split("## Options")[1].split("```")[0]
    fields = [field.name for field in dataclasses.fields(Options)]
    assert [name for name in fields if f"`{name}" not in section] == []
    assert set(Keywords.__annotations__) == set(fields)
