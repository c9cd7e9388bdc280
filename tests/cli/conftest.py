"""A folder of the user's own: a module of networks, a plugin, and the commands run in it."""

from __future__ import annotations

import itertools
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.cli.app import app

_numbers = itertools.count()

NETS = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def tiny():
    return Tiny()

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

def labelled():
    return [(torch.ones(1, 3, 16, 16), torch.tensor([2]))]

def batches():
    return [torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)]
"""

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, ClassVar
import graphopt as go

class HalveRelu(go.RewriteRule):
    """relu(x) -> x * 0.5, except in the head."""
    def pattern(self, op): return op.relu(go.var("x"))
    def check(self, match):
        raise go.Decline("a test pass never rewrites")
    def rewrite(self, build, match): return match["x"]

@go.register
@dataclass(frozen=True)
class PluginPass(go.RewritePass):
    """``relu(x) -> x``, if it dared."""
    name: ClassVar[str] = "plugin-pass"
    contract: ClassVar[go.Contract] = go.exact
    rules = (HalveRelu(),)
    calibration: Any = field(default=None, repr=False)
    bits: int = 8
    axes: tuple[int, ...] = ()

@go.register
@dataclass(frozen=True)
class PluginHalve(go.Pass):
    """``W -> W / 2`` of linear layers."""
    name: ClassVar[str] = "plugin-halve"
    contract: ClassVar[go.Contract] = go.lossy

    def apply(self, edit):
        for node in edit.nodes("linear"):
            weight = go.ops.bind(node)["weight"]
            edit.set_tensor(weight, edit.program.tensor(weight) / 2)
            edit.layer_changed(node, (40, 41), (40, 42), 0.5, "halved")
'''

Cli = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test, with ``plugin.py``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN))
    return tmp_path


@pytest.fixture
def nets(folder: Path) -> str:
    """The name of a module in the current folder that no other test has imported."""
    name = f"nets_of_test_{next(_numbers)}"
    (folder / f"{name}.py").write_text(NETS)
    return name


@pytest.fixture
def cli(folder: Path) -> Cli:
    """Run a command in ``folder`` and return its exit code, stdout and stderr."""
    runner = CliRunner()

    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.output, result.stderr, result.exception)
        return result

    return invoke


@pytest.fixture(autouse=True)
def _interruptible() -> None:
    """A shell ignores SIGINT in what it runs in the background, and the commands that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
