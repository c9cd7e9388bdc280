"""CUDA graphs in a session: what ``tests.backends.cuda.fake_graphs`` finds on the fake driver."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from graphopt.backends.cuda.toolkit import find_nvcc
from tests.backends.cuda.fake_gpu import run_on_fake

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc"),
]

KERNELS = 6
NOTHING = {"launched": 0, "replayed": 0, "mallocs": 0, "graphs": 0}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (line,) = run_on_fake("fake_graphs", tmp_path_factory.mktemp("fake"))
    found: dict[str, Any] = json.loads(line)
    return found


def test_the_second_run_is_recorded_and_replayed(facts: dict[str, Any]) -> None:
    first = {**NOTHING, "launched": KERNELS}
    second = {**NOTHING, "replayed": KERNELS, "graphs": 1}
    third = {**NOTHING, "replayed": KERNELS}
    same = [True, first, True, second, True, third]
    no_result_is_written_to_again = True
    assert facts["replay"] == [*same, no_result_is_written_to_again]


def test_batch_sizes_have_graphs_of_which_the_last_are_kept(facts: dict[str, Any]) -> None:
    assert facts["batches"] == [True, 2, -2]


def test_threads_have_graphs_of_their_own(facts: dict[str, Any]) -> None:
    assert facts["threads"] == [True, True]


def test_tensors_of_the_device(facts: dict[str, Any]) -> None:
    no_machine_before_the_first = True
    counted = {**NOTHING, "launched": KERNELS, "replayed": 3 * KERNELS, "graphs": 1}
    assert facts["on_device"] == [no_machine_before_the_first, True, counted]


def test_a_caller_who_records_gets_the_kernels(facts: dict[str, Any]) -> None:
    """They are neither launched nor replayed while he records, and there is one graph more: his."""
    assert facts["in_a_graph_of_the_caller"] == [{**NOTHING, "graphs": 1}, True]


def test_tensors_that_do_not_fit_are_refused(facts: dict[str, Any]) -> None:
    size = "float32 [s77 in 1..4, 3, 6, 5]"
    assert facts["refused"] == [
        f"argument 'x' has shape [5, 3, 6, 5]; it must be {size}",
        f"argument 'x' has dtype float64; it must be {size}",
        "argument 'x' is on cpu:0, shape (2, 3, 6, 5), strides (90, 30, 5, 1); it must be contiguous and on the GPU",
    ]


def test_the_option_turns_them_off(facts: dict[str, Any]) -> None:
    assert facts["off"] == [True, 0]


def test_a_recording_that_fails_is_logged_and_kernels_are_launched(facts: dict[str, Any]) -> None:
    said = "kernels are launched one by one, not as a CUDA graph: "
    assert facts["broken"] == [
        [True, 0, [f"{said}cudaStreamEndCapture: invalidated"]],
        [True, 0, [f"{said}recording failed: out of memory"]],
    ]
    assert facts["no_memory"] == [True, 0, [f"{said}recording failed: out of memory"]]
    ((*launched, (line,)),) = [facts["missing"]]
    assert launched == [True, 0]
    assert line.startswith(f"{said}CUDA's runtime has no graphs (libnothing.so: ")
