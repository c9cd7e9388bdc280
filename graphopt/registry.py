"""The registry: pass name -> pass class, filled by ``@register``, plugins and entry points."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from graphopt.contract import Contract
from graphopt.errors import RegistryError
from graphopt.passing import Pass

ENTRY_POINTS = "graphopt.passes"
P = TypeVar("P", bound=type[Pass])

_passes: dict[str, type[Pass]] = {}
_entry_points_loaded: set[str] = set()


def register(cls: P) -> P:
    """Class decorator: add a pass under its ``name``.

    Raises RegistryError where the class is no frozen dataclass of options, lacks a name or contract, or takes a name
    that another class holds.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise RegistryError(f'pass {cls.__name__} has no name; set `name = "..."` on the class')
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise RegistryError(
            f"pass {name!r} must be a frozen dataclass; put @dataclass(frozen=True) under @register"
        )
    if not isinstance(getattr(cls, "contract", None), Contract):
        raise RegistryError(
            f"pass {name!r} declares no contract; set `contract = exact`, `within(eps)` or `lossy`"
        )
    known = _passes.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise RegistryError(
            f"pass name {name!r} is taken by {known.__module__}.{known.__qualname__}"
        )
    _passes[name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name: ours, plugins loaded so far, and installed entry points."""
    importlib.import_module("graphopt.passes")
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.value in _entry_points_loaded:
            continue
        _entry_points_loaded.add(entry.value)
        try:
            entry.load()
        except Exception as error:
            raise RegistryError(
                f"entry point {entry.name!r} ({entry.value}) cannot be loaded: {error}"
            ) from error
    return dict(sorted(_passes.items()))


def get(name: str) -> type[Pass]:
    """The pass of that name; RegistryError names the nearest ones where there is none."""
    import difflib

    passes = all_passes()
    if name in passes:
        return passes[name]
    near = difflib.get_close_matches(name, passes, n=3) or list(passes)
    raise RegistryError(f"no pass is called {name!r}; did you mean {', '.join(near)}?")


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers passes. Code is code: load only files you trust."""
    path = Path(path)
    if not path.is_file():
        raise RegistryError(f"plugin {path} is not a file")
    module_name = f"graphopt_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RegistryError(f"plugin {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    registered = dict(_passes)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        _passes.clear()
        _passes.update(registered)
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(
            f"plugin {path} failed to load: {type(error).__name__}: {error}"
        ) from error
