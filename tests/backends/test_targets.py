"""The target table, and what this CPU makes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphopt import cpu_features as features_module
from graphopt.backends import targets
from graphopt.backends.targets import ALIASES, TARGETS, resolve
from graphopt.cpu_features import parse_cpuinfo
from graphopt.errors import TargetError

_ZEN5 = TARGETS["avx512-vnni"].features | {"avx_vnni"}


def _pretend(monkeypatch: pytest.MonkeyPatch, features: frozenset[str], machine: str) -> None:
    monkeypatch.setattr(targets, "cpu_features", lambda: features)
    monkeypatch.setattr(targets, "architecture", lambda: machine)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (_ZEN5, "avx512-vnni"),
        (TARGETS["avx-vnni"].features, "avx-vnni"),
        (TARGETS["avx512"].features, "avx512"),
        (TARGETS["avx2"].features | {"avx512f"}, "avx2"),
        (TARGETS["avx512-vnni"].features - {"fma"}, "x86-64"),
    ],
)
def test_native_is_the_best_row_that_the_cpu_has_all_features_of(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], expected: str
) -> None:
    _pretend(monkeypatch, features, "x86_64")
    assert resolve("native").name == expected


def test_native_on_a_cpu_without_a_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, frozenset({"asimd"}), "aarch64")
    with pytest.raises(TargetError) as caught:
        resolve("native")
    assert str(caught.value) == (
        "target 'native': this aarch64 CPU runs none of avx512-vnni, avx-vnni, avx512, avx2, "
        "x86-64; compile on it for a named target of another machine instead"
    )


def test_an_x86_row_does_not_run_on_arm_even_with_equal_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _pretend(monkeypatch, _ZEN5, "aarch64")
    assert not TARGETS["x86-64"].runs_here()


def test_names_are_those_of_the_rows_and_aliases_lead_to_rows() -> None:
    assert all(row.name == name for name, row in TARGETS.items())
    assert set(ALIASES.values()) <= set(TARGETS)
    assert not set(ALIASES) & set(TARGETS)
    assert resolve("Zen4") is TARGETS["avx512-vnni"]
    assert resolve("skylake_x") is TARGETS["avx512"]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        resolve("avx-512")
    assert str(caught.value) == (
        "unknown target 'avx-512': did you mean 'avx512'? "
        "known are native, avx512-vnni, avx-vnni, avx512, avx2, x86-64"
    )
    with pytest.raises(TargetError, match=r"^unknown target 'q': known are native, "):
        resolve("q")


def test_missing_features_are_named() -> None:
    assert TARGETS["avx-vnni"].missing(TARGETS["avx2"].features) == ("avx_vnni",)
    assert TARGETS["avx2"].missing(TARGETS["avx512"].features) == ()


def test_cpuinfo_keeps_what_every_processor_has() -> None:
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    assert parse_cpuinfo(text) == {"fpu", "avx2"}
    assert parse_cpuinfo("Features\t: fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert parse_cpuinfo("nothing here") == frozenset()


def test_numpy_agrees_with_the_kernel_where_both_know_a_feature() -> None:
    from_numpy = features_module._numpy_features()
    assert from_numpy <= features_module.cpu_features()


def test_the_code_of_every_row_uses_only_the_features_of_its_target() -> None:
    from graphopt.backends.x86.isa import ISAS

    assert {row.isa for row in TARGETS.values()} == set(ISAS)
    for row in TARGETS.values():
        assert set(ISAS[row.isa].features) <= row.features


def test_importing_the_table_imports_neither_torch_nor_tvm() -> None:
    code = (
        "import sys, graphopt.backends.targets\n"
        "print(sorted({'torch', 'tvm', 'tvm_ffi', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
