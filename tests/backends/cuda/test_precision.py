"""The option ``precision``: what it refuses and records, the kernels that it chooses, their machine code, whole networks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphopt as go
from graphopt.backends.cuda import build
from graphopt.backends.cuda.toolkit import compile_source, find_nvcc
from graphopt.errors import CompileError
from tests.backends.cuda.fake_gpu import run_on_fake
from tests.backends.cuda.fake_precision import Block, Residual
from tests.backends.cuda.test_build import _disassembler

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")


@pytest.fixture(name="program", scope="module")
def _program() -> go.Program:
    torch.manual_seed(7)
    return go.capture(Residual(3).eval(), (torch.randn(3, 3, 7, 7),))


def _without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("a100", "half", "option precision must be one of float32, tf32, float16, not 'half'"),
        (
            "avx2",
            "float16",
            "option precision: target avx2 computes floats in float32, not in float16; "
            "leave the option out, or compile for a GPU",
        ),
        (
            "t4",
            "tf32",
            "option precision: target sm_75 has no tf32, which begins with sm_80; use float16 or float32",
        ),
    ],
)
def test_refused(program: go.Program, target: str, precision: str, message: str) -> None:
    with pytest.raises(CompileError) as caught:
        go.compile(program, target, precision=precision)
    assert str(caught.value) == message


def _forms(artifact: go.Artifact) -> list[tuple[str, str]]:
    return [(k.dtype, k.form) for k in artifact.manifest.kernels if k.macs]


def test_float16(program: go.Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _without_nvcc(monkeypatch)
    artifact = go.compile(program, "sm_75", precision="float16")
    assert artifact.manifest.report["precision"] == artifact.report.precision == "float16"
    on_tensor_cores, direct = ("float16", "mma f16"), ("float16", "direct")
    assert _forms(artifact) == [
        on_tensor_cores,
        direct,  # depthwise
        on_tensor_cores,
        direct,  # grouped
        *[on_tensor_cores] * 4,
    ]
    assert [s.dtype for s in artifact.manifest.inputs + artifact.manifest.outputs] == [
        "float32"
    ] * 2
    assert artifact.program.history[-1].name == "cast-to-float16"
    file = artifact.save(tmp_path / "model.gopt")
    loaded = go.Artifact.load(file)
    assert loaded.manifest.report["precision"] == "float16"
    dtypes = {w.dtype for name, w in loaded.weights.items() if name.endswith("weight")}
    assert dtypes == {np.dtype("float16")}


def test_tf32(program: go.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_nvcc(monkeypatch)
    artifact = go.compile(program, "sm_80", precision="tf32")
    assert artifact.manifest.report["precision"] == "tf32"
    forms = [form for _, form in _forms(artifact)]
    assert forms == ["mma tf32", "", "mma tf32", "", *["mma tf32"] * 4]
    assert [record.name for record in artifact.program.history] == [
        record.name for record in go.compile(program, "sm_80").program.history
    ]


def test_without_the_option_nothing_changes(
    program: go.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_nvcc(monkeypatch)
    plain, named = go.compile(program, "sm_80"), go.compile(program, "sm_80", precision="float32")
    assert plain.members() == named.members()
    assert {dtype for dtype, _ in _forms(plain)} == {"float32"}


def test_a_layer_that_stays_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_nvcc(monkeypatch)
    model = Residual(3).eval()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    program = go.capture(model, (torch.randn(1, 3, 7, 7),))
    report = go.compile(program, "sm_80", precision="float16").report
    reason = "its weights reach 1e+05, and float16 ends at 65504"
    assert report.float_layers == (("linear", reason),)


@needs_nvcc
@pytest.mark.parametrize(
    ("target", "precision", "instruction"),
    [
        ("sm_75", "float16", r"HMMA\.1688\.F32 "),
        ("sm_80", "float16", r"HMMA\.16816\.F32 "),
        ("sm_80", "tf32", r"HMMA\.1688\.F32\.TF32"),
        pytest.param("sm_90", "float16", r"HMMA\.16816\.F32 ", marks=pytest.mark.slow),
        pytest.param("sm_90", "tf32", r"HMMA\.1688\.F32\.TF32", marks=pytest.mark.slow),
    ],
)
def test_machine_code(
    program: go.Program,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    target: str,
    precision: str,
    instruction: str,
) -> None:
    disassembler = _disassembler()
    if disassembler is None:
        pytest.skip("needs nvdisasm to look for HMMA")

    def kept(source: str, arch: str) -> bytes:
        cubin = compile_source(source, arch)
        (tmp_path / "kernels.cubin").write_bytes(cubin)
        return cubin

    monkeypatch.setattr(build, "compile_source", kept)
    go.compile(program, target, precision=precision)
    command = [disassembler, str(tmp_path / "kernels.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(instruction, text)
    # nothing spills to local memory, but two registers of one kernel whose operands tf32 rounds
    assert len(re.findall(r"\bSTL\b", text)) <= (2 if precision == "tf32" else 0)


@needs_nvcc
@pytest.mark.parametrize(
    "target",
    ["sm_80", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_75", "sm_90"))],
)
def test_a_transformer_compiles(target: str) -> None:
    program = go.capture(Block().eval(), (torch.randint(0, 11, (2, 7)),))
    artifact = go.compile(program, target, precision="float16")
    assert artifact.manifest.report["device"]["code"] == "cubin"


def _lines(folder: Path, *names: str) -> dict[str, Any]:
    found = [json.loads(line) for line in run_on_fake("fake_precision", folder, *names)]
    return dict(zip(names, found, strict=True))


# Of the largest output. A sum of at most 180 float32 terms is within 180 * 2**-24 of the program's, which takes them in another
# order, and may then be rounded to float16 the other way: 2**-10 of it. Some six such layers lie behind each other, but what
# one of them adds to an output is that of a few of its many inputs. Attention rounds its probabilities to float16 as well.
_FLOAT16 = 2 * 2.0**-10
# Both operands of the four to six products of an output are within 2**-11 of their value.
_TF32 = 6 * 2 * 2.0**-11
_QUICK = (
    "float16:three channels:dynamic",
    "float16:dense",
    "float16:mixed",
    "float16:tokens:dynamic",
    "tf32:one channel",
)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_sessions_equal_their_programs(tmp_path: Path) -> None:
    found = _lines(tmp_path, *_QUICK)
    _check(found)
    assert found["float16:three channels:dynamic"]["forms"] == ["direct", "mma f16"]
    assert found["tf32:one channel"]["forms"] == ["mma tf32"]
    assert found["tf32:one channel"]["distance"] > 1e-5  # it does round


def _check(found: dict[str, Any]) -> None:
    for name, result in found.items():
        precision = name.partition(":")[0]
        bound = {"float16": _FLOAT16, "tf32": _TF32, "float32": 1e-5}[precision]
        assert result["distance"] < bound, (name, result)
        # against the float32 network: float16 keeps 11 bits of every value that it stores
        assert result["error"] < {"float16": 8 * 2.0**-11}.get(precision, bound), (name, result)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_more_networks(tmp_path: Path) -> None:
    more = ("float16:three channels", "float16:one channel", "tf32:three channels", "tf32:dense")
    seeds = [f"{precision}:{seed}" for precision in ("float16", "tf32") for seed in range(16)]
    every = ("float32", "tf32", "float16")
    both = [
        f"{precision}:{name}"
        for precision in every
        for name in ("block", "causal", "mixed", "deep")
    ]
    _check(_lines(tmp_path, *more, *both, *seeds))
