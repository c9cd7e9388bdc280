"""What an ARM system says of itself: the auxiliary vector's bits, macOS' names, and what is read where neither answers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt import arm_features, cpu_features
from graphopt.arm_features import HWCAPS, auxiliary_value
from graphopt.backends.targets import TARGETS
from graphopt.export.cpu import cpu_values

HEADER = Path("/usr/aarch64-linux-gnu/include/asm/hwcap.h")
GRAVITON3 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 "
    "asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng"
)
HWCAP, HWCAP2 = 0xDFFFFFFF, 0x1F201  # of such a machine


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An ARM machine, whose features are read afresh."""
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    cpu_features.cpu_features.cache_clear()
    yield monkeypatch
    cpu_features.cpu_features.cache_clear()


@pytest.mark.skipif(not HEADER.exists(), reason="needs libc6-dev-arm64-cross for asm/hwcap.h")
def test_bits_are_those_of_the_kernel() -> None:
    defined = re.findall(r"#define HWCAP(2?)_(\w+)\s+\(1(?:UL)? << (\d+)\)", HEADER.read_text())
    kernel = {name.lower(): (int(bool(two)), int(bit)) for two, name, bit in defined}
    assert len(HWCAPS) == 49
    assert {name: kernel[name] for name in HWCAPS} == dict(HWCAPS)


def test_this_process_has_an_auxiliary_vector() -> None:
    assert auxiliary_value(6) == os.sysconf("SC_PAGESIZE")  # AT_PAGESZ
    assert auxiliary_value(12345) == 0


def test_linux_is_asked_by_the_auxiliary_vector(arm: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arm.setattr("platform.system", lambda: "Linux")
    arm.setattr(arm_features, "auxiliary_value", {16: HWCAP, 26: HWCAP2}.get)
    arm.setattr(cpu_features, "_CPUINFO", tmp_path / "absent")
    assert cpu_features.cpu_features() == set(GRAVITON3.split())
    assert TARGETS["graviton3"].missing() == ()
    assert TARGETS["apple-m1"].missing() == ("flagm2", "frint", "sb")


def test_without_an_answer_cpuinfo_is_read(arm: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd crc32\n")
    arm.setattr("platform.system", lambda: "Linux")
    arm.setattr(arm_features, "auxiliary_value", lambda kind: 0)
    arm.setattr(cpu_features, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_features.cpu_features() == {"fp", "asimd", "crc32"}


def test_a_c_library_without_the_function_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert auxiliary_value(16) == 0


def test_macos_is_asked_by_name(arm: pytest.MonkeyPatch) -> None:
    m1 = {"hw.optional.AdvSIMD", "hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_FP16"}
    arm.setattr("platform.system", lambda: "Darwin")
    arm.setattr(arm_features, "_sysctl", lambda name: int(name in m1))
    assert cpu_features.cpu_features() == {"asimd", "asimddp", "fphp", "asimdhp"}
    m2 = m1 | {"hw.optional.arm.FEAT_I8MM"}
    arm.setattr(arm_features, "_sysctl", lambda name: int(name in m2))
    cpu_features.cpu_features.cache_clear()
    assert TARGETS["aarch64-i8mm"].missing() == ()


@pytest.mark.parametrize(
    "row", [r for r in TARGETS.values() if r.architecture == "aarch64"], ids=lambda r: r.name
)
def test_every_target_can_be_asked_for_in_c(row) -> None:
    values = cpu_values("aarch64", row.features)
    assert int(values["hwcap"], 16).bit_count() + int(values["hwcap2"], 16).bit_count() == len(
        row.features
    )
