"""What links a library for another machine: a cross compiler, Zig, or an error that names both."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt as go
from graphopt.backends import link
from graphopt.errors import CompileError

_TRIPLE = "aarch64-unknown-linux-gnu"
_NEITHER = (
    "no compiler on this x86_64 machine links for aarch64: install aarch64-linux-gnu-gcc "
    "(apt-get install gcc-aarch64-linux-gnu) or Zig (pip install ziglang)"
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that this x86-64 machine has these commands, and Zig or not."""

    def pretend(*commands: str, zig: bool) -> None:
        paths = {name: f"/usr/bin/{name}" for name in commands}
        found = importlib.util.spec_from_loader("ziglang", None) if zig else None
        monkeypatch.setattr(link, "architecture", lambda: "x86_64")
        monkeypatch.setattr(shutil, "which", paths.get)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)

    return pretend


def test_a_cross_compiler_comes_first(installed: Callable[..., None]) -> None:
    installed("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", zig=True)
    assert link.cross_compiler(_TRIPLE) == ["/usr/bin/aarch64-linux-gnu-gcc"]
    installed("aarch64-linux-gnu-g++", zig=True)
    assert link.cross_compiler(_TRIPLE) == ["/usr/bin/aarch64-linux-gnu-g++"]


def test_zig_where_there_is_none(installed: Callable[..., None]) -> None:
    installed("gcc", zig=True)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28"]
    assert link.cross_compiler(_TRIPLE) == command


def test_neither_is_an_error_that_names_both(installed: Callable[..., None]) -> None:
    installed("gcc", "g++", zig=False)
    with pytest.raises(CompileError) as caught:
        link.cross_compiler(_TRIPLE)
    assert str(caught.value) == _NEITHER


def test_compile_says_so_before_it_works(installed: Callable[..., None]) -> None:
    program = go.capture(torch.nn.Linear(4, 4).eval(), (torch.zeros(1, 4),))
    installed(zig=False)
    with pytest.raises(CompileError) as caught:
        go.compile(program, target="raspberry-pi-5")
    assert str(caught.value) == _NEITHER


def test_this_machine_links_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "architecture", lambda: "aarch64")
    assert link.linker(_TRIPLE) is None
    assert link.linker("aarch64-linux-gnu") is None


def test_a_failed_link_shows_what_the_compiler_said(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "aarch64-linux-gnu-gcc"
    compiler.write_text("#!/bin/sh\necho cannot find -lc >&2\necho ld returned 1 >&2\nexit 1\n")
    compiler.chmod(0o755)
    installed(zig=False)
    monkeypatch.setattr(shutil, "which", {compiler.name: str(compiler)}.get)
    function = link.linker(_TRIPLE)
    assert function is not None
    with pytest.raises(CompileError) as caught:
        function(str(tmp_path / "out.so"), [], options=["-s"])
    assert str(caught.value) == (
        f"the compiled network could not be linked for {_TRIPLE}: {compiler} failed: cannot find -lc; repair or reinstall it"
    )


def test_android_takes_its_c_library_from_the_process(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, seen = tmp_path / "aarch64-linux-gnu-gcc", tmp_path / "seen"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {seen}\n')
    compiler.chmod(0o755)
    installed(zig=False)
    monkeypatch.setattr(shutil, "which", {compiler.name: str(compiler)}.get)
    function = link.linker("aarch64-linux-android")
    assert function is not None
    function("out.so", ["a.o"], options=["-s"])
    assert seen.read_text() == "-shared -fPIC -o out.so a.o -nostdlib -s\n"
