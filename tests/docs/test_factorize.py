"""Runs docs/factorize.md: every Python block in order, and the recipe on a network that it names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import graphopt as go

PAGE = Path(__file__).parents[2] / "docs" / "factorize.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_every_block_runs() -> None:
    namespace = {"__name__": "factorize"}
    sources = blocks("python")
    assert len(sources) == 7
    for number, source in enumerate(sources, start=1):
        exec(compile(source, f"{PAGE.name}, block {number}", "exec", dont_inherit=True), namespace)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))
        return y


def test_the_recipe_runs() -> None:
    (recipe,) = blocks("yaml")
    x = torch.randn(1, 3, 8, 8)
    program = go.Pipeline.from_text(recipe, calibration=[x])(go.capture(Net().eval(), (x,)))
    changed = {
        record.name: [change.layer for change in record.layers] for record in program.history
    }
    assert changed["tucker-conv"] == ["conv2"]
    assert set(changed["low-rank-linear"]) <= {"fc"}
