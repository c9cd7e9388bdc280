"""Runs docs/compact.md: every Python block, in order, in one namespace, and its recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import graphopt as go
from tests.passes.helpers import network

PAGE = (Path(__file__).parents[2] / "docs" / "compact.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_runs() -> None:
    namespace: dict[str, Any] = {}
    sources = blocks("python")
    assert len(sources) == 5
    for number, source in enumerate(sources, start=1):
        exec(compile(source, f"compact.md, block {number}", "exec"), namespace)


def test_the_recipe_substitutes() -> None:
    (recipe,) = blocks("yaml")
    passes = list(go.Pipeline.from_text(recipe))
    assert [type(pass_).__name__ for pass_ in passes] == [
        "SqueezeSubstitute",
        "Distill",
        "FoldBatchNorm",
        "Quantize",
    ]
    assert passes[0](network("resnet")).history[-1].layers
