"""The interpreter finds what a GPU would do wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Buffer, Expr
from graphopt.backends.cpu.stream import Argument
from graphopt.backends.cuda import dot, pipeline
from graphopt.backends.cuda.device import Device, synchronize
from graphopt.backends.cuda.memory import build
from tests.backends.cuda.harness import AMPERE, ConvCase, conv_workload
from tests.backends.cuda.simt import run
from tests.backends.cuda.simt_memory import Fault
from tests.backends.cuda.test_conv import SMALL

THREADS = 64


def _kernel(body: Any) -> tirx.PrimFunc:
    """One block of two warps: ``body(thread, x, y, shared)`` on 64 integers each."""

    def emit(_: Expr, flats: list[Buffer]) -> None:
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", THREADS) as thread:
            shared = T.alloc_buffer((THREADS,), "int32", scope="shared")
            body(thread, *flats, shared)

    arguments = [Argument(name, (THREADS,), "int32") for name in ("x", "y")]
    return build("kernel", arguments, emit)


def _run(body: Any) -> np.ndarray[Any, Any]:
    x, y = np.arange(THREADS, dtype=np.int32), np.zeros(THREADS, np.int32)
    run(_kernel(body), x, y)
    return y


def _swap(with_barrier: bool) -> Any:
    def body(thread: Expr, x: Buffer, y: Buffer, shared: Buffer) -> None:
        T.buffer_store(shared, x[thread], [thread])
        if with_barrier:
            synchronize()
        T.buffer_store(y, shared[THREADS - 1 - thread], [thread])

    return body


def test_shared_memory_between_barriers() -> None:
    assert (_run(_swap(True)) == np.arange(THREADS)[::-1]).all()
    with pytest.raises(Fault, match="written by one thread and read by another"):
        _run(_swap(False))


def test_a_reader_that_is_overwritten() -> None:
    def body(thread: Expr, x: Buffer, y: Buffer, shared: Buffer) -> None:
        T.buffer_store(shared, x[thread], [thread])
        synchronize()
        T.buffer_store(y, shared[THREADS - 1 - thread], [thread])
        T.buffer_store(shared, x[thread], [thread])

    with pytest.raises(Fault, match="read by one thread and written by another"):
        _run(body)


def test_two_writers_of_one_element() -> None:
    def body(thread: Expr, x: Buffer, y: Buffer, shared: Buffer) -> None:
        T.buffer_store(shared, x[thread], [tirx.floordiv(thread, 2)])

    with pytest.raises(Fault, match="two threads write one byte at once"):
        _run(body)


def test_an_index_outside_a_buffer() -> None:
    with pytest.raises(Fault, match=r"bytes 256\.\. of 256 are touched"):
        _run(lambda thread, x, y, shared: T.buffer_store(y, x[thread + 1], [thread]))


def test_a_vector_that_is_not_aligned() -> None:
    def body(thread: Expr, x: Buffer, y: Buffer, shared: Buffer) -> None:
        with T.If(thread == 0), T.Then():
            T.add_to_parent(y.vstore(1, x.vload(1, "int32x4")))

    with pytest.raises(Fault, match="an access of 16 bytes at 4"):
        _run(body)


def test_memory_read_before_it_is_written() -> None:
    with pytest.raises(Fault, match="read before it is written"):
        _run(lambda thread, x, y, shared: T.buffer_store(y, shared[thread], [thread]))


def test_a_barrier_that_some_threads_miss() -> None:
    def body(thread: Expr, x: Buffer, y: Buffer, shared: Buffer) -> None:
        with T.If(thread < 32), T.Then():
            synchronize()

    with pytest.raises(Fault, match="not reached by every thread"):
        _run(body)


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_is_on_its_way(waits: bool) -> None:
    device = Device(AMPERE)

    def emit(_: Expr, flats: list[Buffer]) -> None:
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", THREADS) as thread:
            shared = T.alloc_buffer((4 * THREADS,), "uint8", scope="shared")
            device.copy(T.address_of(shared[thread * 4]), T.address_of(flats[0][thread * 4]), 4)
            device.commit()
            device.wait(0 if waits else 1)
            synchronize()
            T.buffer_store(flats[1], shared[thread], [thread])

    function = build(
        "kernel", [Argument("x", (256,), "uint8"), Argument("y", (64,), "uint8")], emit
    )
    x, y = np.arange(256).astype(np.uint8), np.zeros(64, np.uint8)
    if waits:
        run(function, x, y)
        assert (y == x[:64]).all()
    else:
        with pytest.raises(Fault, match="read while a copy to it is on its way"):
            run(function, x, y)


@pytest.mark.parametrize("module", [pipeline, dot])
def test_kernels_need_their_barriers(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "synchronize", lambda: None)
    few = conv_workload((70, 40), batch=1, size=(1, 1), kernel=(1, 1), padding=(0, 0))
    case = ConvCase(few if module is dot else conv_workload((20, 40)), 1 if module is dot else 2)
    with pytest.raises(Fault):
        case.by_dot() if module is dot else case.by_tensor_cores(SMALL)
