"""Object files that the machine's compiler makes: symbols, other names for them, no debug sections."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from graphopt import elf

SOURCE = """
extern int needed(int);
__attribute__((weak)) int (*hook)(int);
static int inside(int x) { return needed(x) + 1; }
int shown(int x) { return inside(x) + (hook ? hook(x) : 0); }
"""
MAIN = """
int needed(int x) { return 2 * x; }
static int ten(int x) { return 10 * x; }
int (*my_hook)(int) = ten;
int my_shown(int);
int main(void) { return my_shown(4); }
"""


def built(folder: Path, text: str, *options: str) -> bytes:
    """An object file of C code."""
    (folder / "file.c").write_text(text)
    command = ["gcc", "-g", "-O1", "-fPIC", "-c", *options, "file.c", "-o", "file.o"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "file.o").read_bytes()


@pytest.fixture
def compiled(tmp_path: Path) -> bytes:
    return built(tmp_path, SOURCE)


def test_symbols_are_those_that_other_files_see(compiled: bytes):
    found = {symbol.name: symbol.defined for symbol in elf.symbols(compiled)}
    found.pop("_GLOBAL_OFFSET_TABLE_", None)
    assert found == {"needed": False, "hook": True, "shown": True}
    assert elf.architecture(compiled) in ("x86_64", "aarch64")


def test_renamed_code_links_by_its_new_names_and_runs(compiled: bytes, tmp_path: Path):
    code = elf.renamed(elf.without_debug(compiled), {"shown": "my_shown", "hook": "my_hook"})
    (tmp_path / "code.o").write_bytes(code)
    (tmp_path / "main.c").write_text(MAIN)
    subprocess.run(["gcc", "main.c", "code.o", "-o", "run"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "run"]).returncode == 2 * 4 + 1 + 10 * 4


def test_a_library_does_not_show_renamed_symbols(compiled: bytes, tmp_path: Path):
    (tmp_path / "code.o").write_bytes(elf.renamed(compiled, {"shown": "my_shown"}))
    command = ["gcc", "-shared", "code.o", "-o", "lib.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    shown = subprocess.run(
        ["nm", "-D", "lib.so"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert "my_shown" not in shown
    assert "hook" in shown


def test_debug_sections_are_emptied(compiled: bytes):
    smaller = elf.without_debug(compiled)
    assert b"debug_info" in compiled  # the name of the section
    assert len(smaller) < 0.8 * len(compiled)
    assert elf.symbols(smaller) == elf.symbols(compiled)
    assert elf.without_debug(smaller) == smaller


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="no cross compiler")
def test_code_for_another_machine_is_read_too(tmp_path: Path):
    (tmp_path / "file.c").write_text(SOURCE)
    command = ["aarch64-linux-gnu-gcc", "-O1", "-fPIC", "-c", "file.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "file.o").read_bytes()
    assert elf.architecture(data) == "aarch64"
    names = {symbol.name for symbol in elf.symbols(elf.renamed(data, {"shown": "my_shown"}))}
    assert {"my_shown", "needed", "hook"} <= names


def test_what_is_no_object_file_is_refused(compiled: bytes):
    with pytest.raises(elf.ElfError, match=r"^it is no 64-bit little-endian ELF file$"):
        elf.symbols(b"MZ" + compiled)
    with pytest.raises(elf.ElfError, match=r"^it is no relocatable object file$"):
        elf.symbols(Path("/proc/self/exe").read_bytes())
    with pytest.raises(elf.ElfError, match=r"^its section headers are cut off$"):
        elf.symbols(compiled[:-8])
    other = bytearray(compiled)
    other[18] = 40  # 32-bit ARM
    with pytest.raises(elf.ElfError, match=r"^it is for machine 40, neither x86_64 nor aarch64$"):
        elf.architecture(bytes(other))
    assert elf.without_debug(b"\xcf\xfa\xed\xfe") == b"\xcf\xfa\xed\xfe"
