"""Exports as programs under other conditions: a counted heap, a CPU without the instructions, an emulated ARM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from graphopt.artifact import Artifact
from tests.export import support
from tests.export.support import Logits, Small, build, compiled, example, exported, seeded

COUNTER = """
#include "counted.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);
static atomic_int counting, calls;
static void count(void) { if (counting) calls++; }
void *malloc(size_t n) { count(); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
void *memalign(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
void free(void *p) { count(); __libc_free(p); }

static float x[3 * 32 * 32], y[10];

int main(int arguments, char **values) {
    counted_options options = {.weights_path = values[1], .threads = atoi(values[2])};
    counted_model *model;
    counting = 1;
    if (arguments != 3 || counted_create(&model, &options) != COUNTED_OK) return 2;
    int created = calls;
    calls = 0;
    counted_input input = {x, sizeof x};
    counted_output output = {y, sizeof y};
    for (int i = 0; i < 5; i++) {
        if (counted_run(model, &input, 1, &output, 1) != COUNTED_OK) return 3;
    }
    int ran = calls;
    counting = 0;
    counted_destroy(model);
    printf("%d %d\\n", created > 0, ran);
    return 0;
}
"""


def small(make: type[Small] = Small, **options: Any) -> Artifact:
    return compiled(seeded(make), (example(1, 3, 32, 32),), integer=True, **options)


@pytest.fixture(scope="module")
def here() -> Artifact:
    return small(threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_allocates_nothing(here: Artifact, tmp_path: Path, threads: int):
    folder = exported(here, tmp_path / "counted")
    assert here.manifest.line.workspace > 0  # Winograd's, which TVM takes from the heap
    (folder / "counter.c").write_text(COUNTER)
    sources = ["counter.c", "counted.c", "counted_kernels.o"]
    command = ["gcc", "-std=c11", "-O1", "-w", *sources, "-lm", "-pthread", "-o", "counter"]
    subprocess.run(command, cwd=folder, check=True)
    counter = [str(folder / "counter"), str(folder / "counted.weights"), str(threads)]
    printed = subprocess.run(counter, check=True, capture_output=True, text=True).stdout
    assert printed == "1 0\n"


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-user is not installed")
def test_a_cpu_without_the_instructions_is_refused_and_not_crashed(tmp_path: Path):
    artifact = small(target="avx2", threads=1)
    folder = exported(artifact, tmp_path / "net")
    build(folder, "-static")
    x = example(1, 3, 32, 32).numpy()
    x.tofile(folder / "x.bin")
    files = ["net.weights", "x.bin", "y.bin"]
    old = ["qemu-x86_64", "-cpu", "Nehalem", "./run_net", *files]
    done = subprocess.run(old, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    message = "this CPU lacks instructions that the kernels use; compile the model for it\n"
    assert done.stderr.endswith(message)
    new = ("qemu-x86_64", "-cpu", "max")
    assert support.run(folder, artifact, [x], runner=new) == support.wanted(artifact, [x])


@pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or shutil.which("aarch64-linux-gnu-gcc") is None,
    reason="qemu-user or gcc-aarch64-linux-gnu is not installed",
)
@pytest.mark.parametrize(
    ("target", "cpu", "old"),
    [
        ("raspberry-pi-4", "cortex-a72", None),
        ("raspberry-pi-5", "cortex-a76", "cortex-a72"),
        ("aarch64-dotprod", "cortex-a76", "cortex-a53"),
        ("aarch64-i8mm", "max", "neoverse-n1"),
    ],
)
def test_arm_gives_the_bytes_of_the_definition(
    tmp_path: Path, target: str, cpu: str, old: str | None
):
    artifact = small(Logits, target=target, threads=2)
    folder = exported(artifact, tmp_path / "net")
    build(folder, "-static", cc="aarch64-linux-gnu-gcc")
    x = example(1, 3, 32, 32)
    want = artifact.program(x).detach().numpy().tobytes()
    for threads in (1, 2):
        runner = ("qemu-aarch64", "-cpu", cpu)
        assert support.run(folder, artifact, [x.numpy()], threads, runner) == [want]
    if old is not None:
        files = ["net.weights", "in0.bin", "out0.bin"]
        run = ["qemu-aarch64", "-cpu", old, "./run_net", *files]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 1
        assert "this CPU lacks instructions" in done.stderr
