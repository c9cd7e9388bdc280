"""Runs docs/prune.md: every Python block, in order, in one namespace; every name in its tables is a choice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from graphopt import ops
from graphopt.choice import Choice
from graphopt.passes.prune import Granularity, Schedule, Score

PAGE = (Path(__file__).parents[2] / "docs" / "prune.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def _no_new_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Score, "_members", dict(Score._members))


def test_every_block_runs() -> None:
    namespace: dict[str, Any] = {"yaml_blocks": blocks("yaml")}
    for block in blocks("python"):
        exec(compile(block, "docs/prune.md", "exec", dont_inherit=True), namespace)
    integer = namespace["integer"]
    weights = [t for t in integer.graph_module.state_dict().values() if t.dtype == torch.int8]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros > 0.8 * sum(weight.numel() for weight in weights)
    assert any(ops.masked(node) for node in namespace["quantized"].graph.nodes)


@pytest.mark.parametrize("family", [Score, Schedule, Granularity])
def test_the_tables_name_every_choice(family: type[Choice]) -> None:
    table = PAGE.partition(f"| `{family.__name__.lower()}` |")[2].partition("\n\n")[0]
    written = re.findall(r"^\| `([a-z-]+)(?:: (.*?))?` \|", table, re.MULTILINE)
    assert {name for name, _ in written} >= set(family._members) - {"largest"}
    for name, options in written:
        value = yaml.safe_load(f"{{{name}: {options}}}") if options else name
        assert family.parse(value).name == name
