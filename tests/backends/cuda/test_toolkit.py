"""Where nvcc is looked for, and what is said where it is not there or fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backends.cuda import toolkit
from graphopt.backends.cuda.toolkit import (
    INSTALL,
    compile_source,
    find_nvcc,
    image_as_text,
    image_in_text,
)
from graphopt.errors import CompileError


def _program(folder: Path, text: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _program(tmp_path, "#!/bin/sh\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == path


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_candidates", lambda: ())
    with pytest.raises(CompileError) as caught:
        compile_source("", "sm_80")
    assert str(caught.value) == f"target sm_80: nvcc was not found; {INSTALL}"


def test_what_the_compiler_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _program(tmp_path, "#!/bin/sh\necho 'kernels.cu(3): error: no such type' >&2\nexit 2\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CompileError) as caught:
        compile_source("x", "sm_80")
    assert str(caught.value) == (
        f"target sm_80: {path} cannot compile the kernels: kernels.cu(3): error: no such type"
    )


def test_an_image_survives_as_text() -> None:
    cubin = bytes(range(256))
    assert image_in_text(image_as_text(cubin)) == cubin
    assert image_in_text("#include <cstdint>\n") is None
