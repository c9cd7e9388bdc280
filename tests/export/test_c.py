"""What ``export_c`` writes: it builds without a warning, and gives the bytes that the session gives."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from graphopt import elf
from graphopt.artifact import Artifact, deflate
from graphopt.errors import ExportError
from graphopt.export import export_c
from graphopt.export.cpu import cpu_values
from tests.export import support
from tests.export.support import Several, Small, build, compiled, example, exported, seeded


@pytest.fixture(scope="module")
def single() -> Artifact:
    return compiled(seeded(Small), (example(1, 3, 32, 32),), integer=True, threads=2)


@pytest.fixture(scope="module")
def floating() -> Artifact:
    return compiled(seeded(Small), (example(1, 3, 32, 32),), threads=2)


@pytest.fixture(scope="module")
def several() -> Artifact:
    words = torch.arange(8).reshape(1, 8) % 11
    return compiled(seeded(Several), (words, example(1, 8, 6), example(1, 8, 1) > 0))


@pytest.mark.parametrize("name", ["single", "floating"])
def test_the_bytes_are_those_of_the_session(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    artifact: Artifact = request.getfixturevalue(name)
    folder = exported(artifact, tmp_path / name)
    build(folder)
    for seed in range(2):
        x = example(1, 3, 32, 32, seed=seed).numpy()
        want = support.wanted(artifact, [x])
        for threads in (1, 2, 3):
            assert support.run(folder, artifact, [x], threads) == want


def test_indices_several_inputs_and_outputs_that_are_views(several: Artifact, tmp_path: Path):
    folder = exported(several, tmp_path / "several")
    build(folder)
    rng = np.random.default_rng(0)
    inputs: list[support.Array] = [
        rng.integers(0, 11, (1, 8)),
        rng.standard_normal((1, 8, 6)).astype(np.float32),
        rng.integers(0, 2, (1, 8, 1)).astype(bool),
    ]
    assert support.run(folder, several, inputs) == support.wanted(several, inputs)


def test_without_threads_nothing_of_pthread_is_needed(single: Artifact, tmp_path: Path):
    folder = exported(single, tmp_path / "alone")
    build(folder, "-DALONE_SINGLE_THREAD")
    x = example(1, 3, 32, 32).numpy()
    assert support.run(folder, single, [x]) == support.wanted(single, [x])
    used = subprocess.run(
        ["nm", "run_alone"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    assert "pthread" not in used
    two = [str(folder / "run_alone"), "-t", "2", "alone.weights", "in0.bin", "out0.bin"]
    refused = subprocess.run(two, cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "threads must be at least 1, and 1 where alone.c is built" in refused.stderr


def test_the_library_shows_four_functions_and_needs_no_tvm(single: Artifact, tmp_path: Path):
    folder = exported(single, tmp_path / "net")
    library = build(folder, "-shared", "-fvisibility=hidden", output="libnet.so")
    shown = _lines("nm", "-D", "--defined-only", library)
    assert {line.split()[-1] for line in shown} == {
        "net_create",
        "net_run",
        "net_query",
        "net_destroy",
    }
    needed = [line for line in _lines("readelf", "-d", library) if "NEEDED" in line]
    known = ("libc.so", "libm.so", "ld-linux")  # the last for thread-local variables
    assert all(any(name in line for name in known) for line in needed), needed
    undefined = {line.split()[-1].partition("@")[0] for line in _lines("nm", "-u", library)}
    assert not {name for name in undefined if "tvm" in name.lower()}


def _lines(*command: str | Path) -> list[str]:
    done = subprocess.run(
        [str(each) for each in command], check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_two_exports_fit_into_one_program(single: Artifact, floating: Artifact, tmp_path: Path):
    """Their kernels have names in common."""
    both = tmp_path / "both"
    both.mkdir()
    for name, artifact in (("first", single), ("second", floating)):
        for path in exported(artifact, tmp_path / name).iterdir():
            shutil.copy(path, both)
    (both / "two.c").write_text(
        '#include "first.h"\n#include "second.h"\n'
        "int main(void) { return first_query()->messages[0][0] != second_query()->messages[0][0]; }\n"
    )
    sources = [f"{name}{rest}" for name in ("first", "second") for rest in (".c", "_kernels.o")]
    command = ["gcc", "-std=c11", "two.c", *sources, "-lm", "-pthread", "-o", "two"]
    subprocess.run(command, cwd=both, check=True)
    subprocess.run([both / "two"], check=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_the_library_and_the_example(single: Artifact, tmp_path: Path):
    folder = exported(single, tmp_path / "net")
    for shared in ("OFF", "ON"):
        made = tmp_path / f"build_{shared}"
        configure = ["cmake", "-S", str(folder), "-B", str(made), f"-DBUILD_SHARED_LIBS={shared}"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", str(made)], check=True, stdout=subprocess.DEVNULL)
        x = example(1, 3, 32, 32).numpy()
        shutil.copy(made / "run_net", folder / "run_net")
        assert support.run(folder, single, [x]) == support.wanted(single, [x])


def test_two_exports_of_one_model_are_the_same_files(single: Artifact, tmp_path: Path):
    first, second = (exported(single, tmp_path / n / "net") for n in map(_made(tmp_path), "ab"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def _made(folder: Path):
    def make(name: str) -> str:
        (folder / name).mkdir()
        return name

    return make


def test_the_lines_of_the_folders_own_readme_build_and_use_it(single: Artifact, tmp_path: Path):
    folder = exported(single, tmp_path / "net")
    text = (folder / "README.md").read_text()
    [line] = re.findall(r"^    (cc .*)$", text, re.MULTILINE)
    subprocess.run(line.split(), cwd=folder, check=True)
    x = example(1, 3, 32, 32).numpy()
    assert support.run(folder, single, [x]) == support.wanted(single, [x])
    [code] = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    include, body = code.split("\n", 1)
    arrays = "static float x[3 * 32 * 32], softmax[10];"
    main = f"{include}\n#include <stdio.h>\n{arrays}\nint main(void) {{\n{body}\nreturn (int)status;\n}}\n"
    (folder / "main.c").write_text(main)
    subprocess.run(build(folder), cwd=folder, check=True)


def test_the_example_of_the_document_builds(single: Artifact, tmp_path: Path):
    folder = exported(single, tmp_path / "net")
    document = Path(__file__).parents[2] / "docs" / "deploy.md"
    [code] = re.findall(r"```c\n(.*?)```", document.read_text(), re.DOTALL)
    (folder / "main.c").write_text(code)
    done = subprocess.run(build(folder), cwd=folder, capture_output=True, text=True)
    assert done.stdout == "the size of an input or output is wrong\n"  # 224 x 224 for 32 x 32


def test_a_kernel_is_called_with_the_layer_beside_it(floating: Artifact, tmp_path: Path):
    text = (exported(floating, tmp_path / "net") / "net.c").read_text()
    [line] = [line for line in text.splitlines() if line.endswith("/* stem, relu */")]
    assert line.strip().startswith("{net_kernel_conv2d_f32_3x3s2_")


class TopK(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.topk(3)[0]


def test_what_c_cannot_hold_is_refused_by_the_operators_name(tmp_path: Path):
    artifact = compiled(TopK(), (example(1, 16),))
    with pytest.raises(ExportError) as caught:
        export_c(artifact, tmp_path / "net")
    assert str(caught.value) == (
        "the model is no straight line of kernel calls: operator 'topk' calls tvm.contrib.sort.topk of TVM's runtime"
    )
    assert not list(tmp_path.iterdir())


def test_an_artifact_without_an_object_file_is_refused(single: Artifact, tmp_path: Path):
    with pytest.raises(
        ExportError, match=r"^the model is compiled for .*, whose kernels are in no ELF"
    ):
        export_c(dataclasses.replace(single, deflated_kernels=deflate(b"")), tmp_path / "net")
    with pytest.raises(ExportError) as caught:
        export_c(
            dataclasses.replace(single, deflated_kernels=deflate(single.kernels[:-1])),
            tmp_path / "net",
        )
    assert str(caught.value) == (
        "the object file in the model cannot be read: its section headers are cut off; compile the model again"
    )
    other = elf.renamed(
        single.kernels, {"__tvm_ffi_" + single.manifest.line.calls[0].function: "x"}
    )
    with pytest.raises(ExportError, match=r"^operator '\w+' is a function of TVM's runtime"):
        export_c(dataclasses.replace(single, deflated_kernels=deflate(other)), tmp_path / "net")


@pytest.mark.parametrize("name", ["", "Net", "9net", "net.1", "main", "math", "_net"])
def test_a_name_that_is_no_prefix_is_refused(single: Artifact, tmp_path: Path, name: str):
    with pytest.raises(ExportError, match=r"^the name '.*' cannot be a prefix of C functions"):
        export_c(single, tmp_path / "out", name)


def test_a_feature_without_a_test_is_refused():
    with pytest.raises(
        ExportError, match=r"^the target needs warp_drive, which C code has no test"
    ):
        cpu_values("x86_64", {"avx2", "warp_drive"})
    assert cpu_values("aarch64", {"asimd", "asimddp", "i8mm"}) == {
        "hwcap": hex(1 << 1 | 1 << 20),
        "hwcap2": hex(1 << 13),
    }
    assert cpu_values("x86_64", {"avx", "sse4_1"}) == {
        "features": "    {0x1, 0, 2, 0x10080000},",
        "saved": "0x6",
    }
