"""Sessions: right answers, named errors, many threads, and neither torch nor the TVM compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.artifact import Artifact, load
from graphopt.errors import ArtifactError, InputError
from graphopt.manifest import Dim, TensorSpec
from graphopt.session import Session
from graphopt.weights_file import aligned_empty
from tests import compiled


@pytest.fixture(scope="module")
def session() -> Session:
    return compiled.artifact().session(threads=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return compiled.artifact().save(tmp_path / "model.gopt")


def _aligned(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = aligned_empty(x.shape, x.dtype)
    copy[...] = x
    return copy


def _read_only(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = _aligned(x)
    copy.flags.writeable = False
    return copy


def test_a_loaded_model_computes(saved: Path) -> None:
    x = compiled.inputs()
    session = load(saved)
    assert session.input_names == ("x",)
    assert session.threads == 1
    assert repr(session) == "Session(x: float32 [batch in 1..8, 64]; x86-64, 1 threads)"
    assert compiled.same(session(x)[:2], compiled.expected(x))
    assert compiled.same(session(x=x)[:2], compiled.expected(x))


@pytest.mark.parametrize("batch", [1, 8, 2])
def test_one_compile_serves_a_range_of_batches(session: Session, batch: int) -> None:
    x = compiled.inputs(batch)
    assert compiled.same(session(x)[:2], compiled.expected(x))


@pytest.mark.parametrize(
    "layout",
    [
        _aligned,
        _read_only,
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[:, ::-1].copy()[:, ::-1],
        lambda x: np.ndarray(x.shape, x.dtype, b"\0\0\0" + x.tobytes(), 3),
    ],
    ids=["aligned", "read-only", "column-major", "strided", "reversed", "odd-address"],
)
def test_any_memory_layout_gives_the_same_answer(
    session: Session, layout: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> None:
    x = compiled.inputs()
    assert compiled.same(session(layout(x))[:2], compiled.expected(x))


def test_dlpack_tensors_are_accepted(session: Session) -> None:
    torch = pytest.importorskip("torch")
    x = compiled.inputs()
    assert compiled.same(session(torch.from_numpy(x))[:2], compiled.expected(x))
    with pytest.raises(InputError, match=r"^argument 'x' cannot be read through DLPack \("):
        session(torch.from_numpy(x).requires_grad_())


def test_outputs_belong_to_the_caller(session: Session) -> None:
    x = _aligned(compiled.inputs())
    first = session(x)
    assert compiled.same(first[2:], (x, compiled.weights()["fc.bias"]))
    for output in first:
        assert output.flags.writeable
        output[...] = -1
    assert compiled.same(session(x)[:2], compiled.expected(compiled.inputs()))
    assert np.array_equal(x, compiled.inputs())
    kept = session(compiled.inputs(seed=5))
    session(compiled.inputs(seed=6))
    assert compiled.same(kept[:2], compiled.expected(compiled.inputs(seed=5)))


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (1, lambda positive, product: product),
        ({"list": [0]}, lambda positive, product: [positive]),
        (
            {"dict": [["logits", 0], ["more", {"tuple": [1, {"value": None}]}]]},
            lambda positive, product: {"logits": positive, "more": (product, None)},
        ),
    ],
)
def test_outputs_have_the_structure_of_the_model(
    structure: Any, expected: Callable[..., Any]
) -> None:
    x = compiled.inputs()
    result = compiled.artifact(structure).session()(x)
    wanted = expected(*compiled.expected(x))
    assert type(result) is type(wanted)
    np.testing.assert_equal(result, wanted)


def _message(session: Session, *inputs: Any, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        session(*inputs, **named)
    return str(caught.value)


def test_bad_inputs_are_named(session: Session) -> None:
    must = "; it must be float32 [batch in 1..8, 64]"
    x = compiled.inputs()
    assert _message(session, x.astype(np.float64)) == f"argument 'x' has dtype float64{must}"
    assert _message(session, x.astype(">f4")) == f"argument 'x' has dtype >f4{must}"
    assert _message(session, x[0]) == f"argument 'x' has 1 dimensions{must}"
    assert _message(session, x[:, :63]) == f"argument 'x' has shape [3, 63]{must}"
    assert _message(session, x[:0]) == f"argument 'x' has shape [0, 64]{must}"
    assert _message(session, compiled.inputs(9)) == f"argument 'x' has shape [9, 64]{must}"
    assert (
        _message(session, x.tolist()) == f"argument 'x' is a list, no NumPy or DLPack array{must}"
    )
    assert _message(session) == "0 arguments were given for the 1 inputs x"
    assert _message(session, x, x) == "2 arguments were given for the 1 inputs x"
    unknown = "is unknown or given twice; the inputs are x"
    assert _message(session, y=x) == f"argument 'y' {unknown}"
    assert _message(session, x, x=x) == f"argument 'x' {unknown}"


def test_a_symbol_has_one_size_over_all_inputs(session: Session) -> None:
    batch = Dim("batch", 1, None)
    specs = tuple(TensorSpec(name, "float32", (batch, 2)) for name in "ab")
    two = compiled.artifact(inputs=specs).session()
    message = _message(two, np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32))
    assert message == ("argument 'b' has shape [3, 2]; it must be float32 [batch in 1.., 2]")


def test_a_failed_call_does_not_spoil_the_next(session: Session) -> None:
    x = compiled.inputs()
    with pytest.raises(InputError):
        session(x[:, :5])
    assert compiled.same(session(x)[:2], compiled.expected(x))


def test_four_threads_share_a_session(session: Session) -> None:
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        start.wait()
        x = compiled.inputs(1 + seed, seed)
        wanted = compiled.expected(x)
        return all(compiled.same(session(x)[:2], wanted) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert 1 <= len(session._idle) <= 4  # machines are reused


def test_threads_must_be_positive_and_are_cut_to_the_cpus() -> None:
    artifact = compiled.artifact()
    with pytest.raises(InputError) as caught:
        artifact.session(threads=0)
    assert str(caught.value) == "argument 'threads' is 0; it must be 1 or more"
    assert artifact.session(threads=10**6).threads == len(os.sched_getaffinity(0))


def test_a_library_that_is_no_model_is_refused() -> None:
    for library in (b"", b"not ELF"):
        broken = Artifact(compiled.manifest(), library, compiled.weights())
        with pytest.raises(ArtifactError) as caught:
            broken.session()
        assert re.fullmatch(
            r"model\.so cannot be loaded as a compiled model from \S+; if programs may not run from "
            r"there, set TMPDIR to a folder where they may",
            str(caught.value),
        )


def test_two_models_in_one_process_keep_their_own_code() -> None:
    x = compiled.inputs()
    first = compiled.artifact().session()
    library = compiled.library(negated=True)
    second = Artifact(compiled.manifest(), library, compiled.weights()).session()
    assert compiled.same(first(x)[:2], compiled.expected(x))
    assert compiled.same(second(x)[:2], compiled.expected(-x))


def test_an_instrument_sees_every_kernel_and_may_run_it_itself(session: Session) -> None:
    x, seen = compiled.inputs(), []

    def instrument(function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        if not before or name.startswith(("vm.", "shape_func")):
            return 0
        seen.append(name)
        function(*arguments)
        return 1

    result = session.run_instrumented(instrument, x)
    assert seen == ["matmul", "add", "relu"]
    assert compiled.same(result[:2], compiled.expected(x))


def _image_by_image() -> Artifact:
    outputs = compiled.manifest().outputs[:3]
    structure = {"tuple": [0, 1, 2]}
    return compiled.artifact(structure, image_by_image=True, outputs=outputs)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_images_are_run_one_by_one(batch: int) -> None:
    session, x = _image_by_image().session(threads=1), compiled.inputs(batch)
    seen: list[int] = []

    def instrument(function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        if before and name == "matmul":
            seen.append(arguments[0].shape[0])
        return 0

    for result in (session(x), session.run_instrumented(instrument, x)):
        assert compiled.same(result[:2], compiled.expected(x))
        assert np.array_equal(result[2], x)
        result[2][...] = 0
        assert x.any()  # what is returned is the caller's
    assert seen == [1] * batch
    with pytest.raises(InputError, match="it must be float32"):
        session(compiled.inputs(9))


def test_an_image_between_two_others_is_read_where_it_is() -> None:
    x = _aligned(compiled.inputs(3))
    machine = _image_by_image().session(threads=1)._machine()
    given = machine.inputs[0].tensor(x[1:2])
    assert given.data_ptr() == x.ctypes.data + x[0].nbytes


_HEADER = """
import sys, os
import numpy as np
x = np.load(sys.argv[2])
def check(session):
    for one, other in zip(session(x)[:2], np.load(sys.argv[3]).values()):
        assert np.array_equal(one, other)
"""

_RUNTIME_ONLY = """
import ctypes
sys.modules["torch"] = None  # importing it raises ImportError
real = ctypes.CDLL.__init__
def refuse(self, name, *rest, **options):
    assert "tvm_compiler" not in str(name)
    real(self, name, *rest, **options)
ctypes.CDLL.__init__ = refuse
from graphopt.artifact import load
check(load(sys.argv[1]))
assert not {"torch", "tvm"} & {name for name, module in sys.modules.items() if module}
assert "tvm_compiler" not in open("/proc/self/maps").read()
"""

_TORCH_STAYS_AWAY = """
from graphopt.artifact import load
check(load(sys.argv[1]))
assert not {"torch", "tvm"} & set(sys.modules)
import torch
assert torch.ones(2).sum().item() == 2
check(load(sys.argv[1]))
"""

_COMPILER_AFTERWARDS = """
from graphopt.artifact import load
first = load(sys.argv[1])
check(first)
import torch, tvm
from tvm.relax.frontend.torch import from_exported_program
exported = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(1, 4),))
module = from_exported_program(exported, keep_params_as_input=False)
machine = tvm.relax.VirtualMachine(tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})), tvm.cpu())
assert np.isfinite(np.from_dlpack(machine["main"](tvm.runtime.tensor(np.ones((1, 4), "float32")))[0])).all()
check(first)
check(load(sys.argv[1]))
"""

_COMPILER_BEFORE = """
import tvm
assert not tvm.base._RUNTIME_ONLY
from graphopt.artifact import load
check(load(sys.argv[1]))
"""

_THREADS = """
from graphopt.artifact import load
def count():
    return len(os.listdir("/proc/self/task"))
affinity = os.sched_getaffinity(0)
before = count()
one = load(sys.argv[1], threads=1)
check(one)
assert count() == before, "one thread starts no other"
check(load(sys.argv[1], threads=2))
assert count() == before + (len(affinity) > 1) * (len(affinity) - 1)
from graphopt.runtime import tvm_runtime
used = tvm_runtime().get_global_func("runtime.NumThreads")
assert used() == min(2, len(affinity))
check(one)
assert used() == 1
assert os.sched_getaffinity(0) == affinity, "the caller is not pinned"
"""


@pytest.mark.parametrize(
    "code",
    [_RUNTIME_ONLY, _TORCH_STAYS_AWAY, _COMPILER_AFTERWARDS, _COMPILER_BEFORE, _THREADS],
    ids=["runtime-only", "torch-later", "compiler-later", "compiler-first", "threads"],
)
def test_in_a_fresh_interpreter(saved: Path, tmp_path: Path, code: str) -> None:
    x = compiled.inputs()
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "y.npz", *compiled.expected(x))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    done = subprocess.run(
        [sys.executable, "-c", _HEADER + code, saved, tmp_path / "x.npy", tmp_path / "y.npz"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
