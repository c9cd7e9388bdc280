"""The target table, and what this CPU makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    _pretend(monkeypatch, frozenset({"vfp"}), "armv7l")
    with pytest.raises(TargetError) as caught:
        resolve("native")
    names = ", ".join(row.name for row in TARGETS.values() if row.kind == "cpu")
    assert str(caught.value) == (
        f"target 'native': this armv7l CPU runs none of {names}; "
        "compile on it for a named target of another machine instead"
    )


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid", "aarch64"),
        (
            "fp asimd crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
            "aarch64-dotprod",
        ),
        ("fp asimd fphp asimddp sve asimdfhm i8mm bf16 dgh rng", "aarch64-i8mm"),
    ],
)
def test_native_on_arm_is_a_row_of_instructions_and_no_chip(
    monkeypatch: pytest.MonkeyPatch, features: str, expected: str
) -> None:
    _pretend(monkeypatch, parse_cpuinfo(f"Features\t: {features}\n"), "aarch64")
    assert resolve("native").name == expected


# What the kernels of these machines say of them.
_CHIPS = {
    "raspberry-pi-4": "fp asimd evtstrm crc32 cpuid",
    "raspberry-pi-5": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    "graviton2": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs",
    "graviton3": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
    "sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng",
    "apple-m1": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
    "asimddp sha512 asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp flagm2 frint",
}


@pytest.mark.parametrize("name", _CHIPS)
def test_a_chip_has_what_its_target_needs(name: str) -> None:
    text = "".join(f"processor\t: {i}\nFeatures\t: {_CHIPS[name]}\n\n" for i in range(4))
    assert TARGETS[name].missing(parse_cpuinfo(text)) == ()


def test_an_older_chip_lacks_the_dot_product() -> None:
    older = parse_cpuinfo(f"Features\t: {_CHIPS['raspberry-pi-4']}\n")
    assert TARGETS["aarch64-dotprod"].missing(older) == ("asimddp",)
    assert TARGETS["aarch64-i8mm"].missing(older) == ("asimddp", "i8mm")


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
        f"unknown target 'avx-512': did you mean 'avx512'? known are native, {', '.join(TARGETS)}"
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


def test_an_arm_core_is_called_by_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    core = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n"
    core += "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    (tmp_path / "cpuinfo").write_text(core * 4)
    monkeypatch.setattr(features_module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert features_module.cpu_name() == "aarch64 0x41.0xd0b.1"


def test_numpy_agrees_with_the_kernel_where_both_know_a_feature() -> None:
    from_numpy = features_module._numpy_features()
    assert from_numpy <= features_module.cpu_features()


def test_the_code_of_every_row_uses_only_the_features_of_its_target() -> None:
    from graphopt.backends.isas import ISAS

    rows = [row for row in TARGETS.values() if row.kind == "cpu"]
    assert {row.isa for row in rows} == set(ISAS)
    for row in rows:
        machine = ISAS[row.isa].mtriple.partition("-")[0]
        assert machine == row.architecture
        assert set(ISAS[row.isa].features) <= row.features


def test_importing_the_table_imports_neither_torch_nor_tvm() -> None:
    code = (
        "import sys, graphopt.backends.targets\n"
        "print(sorted({'torch', 'tvm', 'tvm_ffi', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
