"""docs/targets.md: the chip that the page adds gets kernels that are exact, and a target that resolves."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from graphopt.backends import targets
from tests.backends.arm import machine
from tests.backends.arm.machine import needs_qemu
from tests.backends.cpu.conv_harness import check_exact, conv_workload

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(source, "targets.md", "exec"), namespace)
    return namespace


@needs_qemu
def test_a_new_row_makes_exact_kernels(
    rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows["ROW"]
    monkeypatch.setitem(machine.PROCESSORS, row.name, "cortex-a76")
    check_exact(conv_workload((20, 36), (9, 9), y_margin=1), row)


def test_its_target_resolves_and_needs_what_the_kernels_use(
    rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, row = rows["TARGET"], rows["ROW"]
    table = MappingProxyType({**targets.TARGETS, target.name: target})
    monkeypatch.setattr(targets, "TARGETS", table)
    assert targets.resolve("rock_5") is target
    assert target.isa == row.name
    assert set(row.features) <= target.features
    assert target.architecture == row.mtriple.partition("-")[0]
