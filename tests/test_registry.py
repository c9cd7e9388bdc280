from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import graphopt as go
from graphopt import registry
from graphopt.errors import RegistryError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))


def test_our_passes_are_listed_in_order() -> None:
    names = list(registry.all_passes())
    assert names == sorted(names)
    assert {"fold-batch-norm", "remove-dead-code", "fold-constants"} <= set(names)


def test_every_pass_has_a_name_a_contract_and_an_equation() -> None:
    for name, cls in registry.all_passes().items():
        file = cls.__module__.rpartition(".")[2]
        if cls.__module__.startswith("graphopt."):
            assert file.replace("_", "-") == name
        assert isinstance(cls.contract, go.Contract)
        assert cls.__doc__
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{name} has no docstring"


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(
        RegistryError, match=r"^no pass is called 'fold-batchnorm'; did you mean fold-batch-norm"
    ):
        registry.get("fold-batchnorm")


def declared(**attributes: Any) -> type[go.Pass]:
    body = {"apply": lambda self, edit: None, "__module__": "somewhere", **attributes}
    return type("Mine", (go.Pass,), body)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (declared(), 'pass Mine has no name; set `name = "..."` on the class'),
        (
            dataclass(frozen=True)(declared(name="mine")),
            "pass 'mine' declares no contract; set `contract = exact`, `within(eps)` or `lossy`",
        ),
        (
            dataclass(frozen=True)(declared(name="fold-batch-norm", contract=go.exact)),
            "pass name 'fold-batch-norm' is taken by "
            "graphopt.passes.fuse.fold_batch_norm.FoldBatchNorm",
        ),
    ],
    ids=["name", "contract", "taken"],
)
def test_bad_declarations(cls: type[go.Pass], message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registry.register(cls)
    assert str(caught.value) == message


GOOD = """
from dataclasses import dataclass
import graphopt as go

@go.register
@dataclass(frozen=True)
class Mine(go.Pass):
    name = "mine"
    contract = go.exact
    def apply(self, edit): pass
"""


def test_a_plugin_registers_its_passes(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(GOOD, encoding="utf-8")
    registry.load_plugin(path)
    registry.load_plugin(str(path))  # again is no conflict
    assert registry.get("mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "failed to load: ZeroDivisionError: division by zero"),
        (GOOD + "raise ValueError('late')", "failed to load: ValueError: late"),
        (GOOD.replace('"mine"', '""'), "pass Mine has no name"),
    ],
    ids=["error", "late-error", "no-name"],
)
def test_a_plugin_that_fails_leaves_nothing(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "failing.py"
    path.write_text(source, encoding="utf-8")
    before = dict(registry._passes)
    with pytest.raises(RegistryError) as caught:
        registry.load_plugin(path)
    assert message in str(caught.value)
    assert registry._passes == before
    assert "graphopt_plugin_failing" not in sys.modules


def test_a_plugin_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"is not a file$"):
        registry.load_plugin(tmp_path / "absent.py")


def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Entry:
        name, value = "mine", "my_package.passes"

        def load(self) -> None:
            path = tmp_path / "entry.py"
            path.write_text(GOOD.replace('"mine"', '"from-entry-point"'), encoding="utf-8")
            registry.load_plugin(path)

    class Broken(Entry):
        value = "my_package.absent"

        def load(self) -> None:
            raise ImportError("no module")

    monkeypatch.setattr(registry, "_entry_points_loaded", set())
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    assert "from-entry-point" in registry.all_passes()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    with pytest.raises(
        RegistryError,
        match=r"^entry point 'mine' \(my_package.absent\) cannot be loaded: no module$",
    ):
        registry.all_passes()
