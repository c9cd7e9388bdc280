"""The version of the kernel generator: a hash of its code, so that measurements of other kernels are not believed."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

_PACKAGE = "graphopt.backends"


@functools.cache
def generator_version(root: str = f"{_PACKAGE}.cpu.trial") -> str:
    """A hash of the code that ``root`` and the backend modules it imports consist of; comments do not count."""
    code: dict[str, str] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in code or path is None:
            continue
        tree = _without_docstrings(ast.parse(path.read_text()))
        code[name] = ast.dump(tree)
        waiting += _imported(tree)
    text = "".join(f"{name} {code[name]}" for name in sorted(code))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(name: str) -> Path | None:
    """The file of a module; None where the name is something in a module."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def _imported(tree: ast.Module) -> list[str]:
    """The names of backend modules in ``from`` imports, and names that may be modules of them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_PACKAGE):
            found.append(node.module)
            if node.module.count(".") == 2:  # from graphopt.backends.cpu import emit
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
