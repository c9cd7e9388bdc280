"""The generator's version changes with the code of what it imports, and with nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from graphopt.backends.cpu.generator import generator_version


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write two modules and return the version of the one that imports the other."""
    folder = tmp_path / "generated"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("graphopt.backends.cpu.generator._PACKAGE", "generated")

    def write(root: str, imported: str) -> str:
        (folder / "__init__.py").touch()
        (folder / "root.py").write_text(f"{root}\nfrom generated.other import x")
        (folder / "other.py").write_text(imported)
        importlib.invalidate_caches()
        generator_version.cache_clear()
        return generator_version("generated.root")

    yield write
    generator_version.cache_clear()


def test_comments_do_not_count_but_code_does(version) -> None:
    first = version("y = 1", "x = 1")
    assert version('"""Doc."""\ny = 1  # why', "# more\nx = 1") == first
    assert len({first, version("y = 2", "x = 1"), version("y = 1", "x = 2")}) == 3


def test_the_real_one_is_stable() -> None:
    assert generator_version() == generator_version()
    assert len(generator_version()) == 16
