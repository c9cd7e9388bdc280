"""The package's public names: lazy when run, spelled out for type checkers, the same in both places."""

from __future__ import annotations

import ast
from pathlib import Path

import graphopt as go


def test_type_checkers_see_the_names_that_are_lazy() -> None:
    tree = ast.parse(Path(go.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == set(go.__all__) - {"__version__"}


def test_every_name_resolves() -> None:
    for name in go.__all__:
        assert getattr(go, name) is not None
