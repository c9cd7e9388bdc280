"""Candidates fit, forms of one workload share a key, and choices survive being written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphopt.backends.cpu.candidates import (
    candidates,
    fits,
    read_choice,
    refinements,
    tuned_form,
    workload_key,
    write_choice,
)
from graphopt.backends.cpu.conv import conv2d
from graphopt.backends.cpu.conv_plan import ConvChoice, plan_conv2d
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Requantize
from graphopt.backends.x86.isa import ISAS
from tests.backends.cpu.conv_harness import RESIDUAL_ADD, check_exact, conv_workload
from tests.backends.cpu.stream_harness import ROWS

WORKLOADS = {
    "3x3": conv_workload((64, 64), (14, 14)),
    "1x1": conv_workload((24, 144), (28, 28), (1, 1), padding=(0, 0)),
    "linear": conv_workload((64, 100), (1, 1), (1, 1), padding=(0, 0)),
    "groups": conv_workload((32, 64), (9, 9), groups=2, dtype="float32"),
    "dynamic": conv_workload((8, 24), (3, 3), (1, 1), padding=(0, 0), batch=None),
}


@pytest.mark.parametrize("row", ISAS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("name", WORKLOADS)
def test_candidates_fit_and_differ(name: str, row) -> None:
    workload = tuned_form(WORKLOADS[name])
    plan = plan_conv2d(workload, row)
    found = candidates(workload, row)
    assert len(set(found)) == len(found) <= 24
    assert ConvChoice(plan.pixels, plan.vectors) not in found
    for best in (None, *found[:2]):
        others = refinements(workload, row, 2, best)
        assert len(set(others)) == len(others) <= 6
        assert all(fits(workload, row, choice) for choice in [*found, *others])


def test_candidates_compute_the_same() -> None:
    workload = conv_workload((8, 24), (5, 6))
    best = candidates(workload, ROWS[0])[0]
    for choice in (best, *refinements(workload, ROWS[0], 1, best)):
        check_exact(workload, ROWS[0], choice=choice)


def test_a_choice_of_another_row_does_not_fit() -> None:
    workload = WORKLOADS["3x3"]
    assert fits(workload, ISAS["avx512-vnni"], ConvChoice(14, 2))
    assert not fits(workload, ISAS["avx2"], ConvChoice(14, 2))


def test_numbers_of_a_calibration_do_not_count() -> None:
    def workload(zero_point: int, multiplier: int, qmin: int = 0) -> Conv2d:
        requantize = Requantize(zero_point, qmin, 255)
        add = replace(RESIDUAL_ADD, a_multiplier=multiplier, a_zero_point=zero_point)
        conv = conv_workload((8, 16), epilogue=Epilogue(requantize, add))
        return replace(conv, x_zero_point=zero_point, x=replace(conv.x, fill=zero_point))

    key = workload_key(workload(3, 1000))
    assert workload_key(workload(200, 7)) == key
    assert workload_key(workload(0, 1000)) != key  # an addition less
    assert workload_key(workload(3, 1000, qmin=3)) != key
    assert workload_key(conv_workload((8, 16), batch=None)) == workload_key(conv_workload((8, 16)))
    assert workload_key(conv_workload((8, 16), batch=2)) != workload_key(conv_workload((8, 16)))


@pytest.mark.parametrize("choice", [ConvChoice(14, 2), ConvChoice(7, 3, chunk=4)])
def test_choices_survive_being_written(choice: ConvChoice) -> None:
    assert read_choice(write_choice(choice)) == choice


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"algorithm": "magic"}', '{"algorithm": "direct", "height": 3}', "3"]
)
def test_refuses_what_is_no_choice(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no choice|Expecting value"):
        read_choice(text)


def test_form_and_workload_have_one_plan() -> None:
    for workload in WORKLOADS.values():
        row = ISAS["avx2"]
        assert (
            plan_conv2d(tuned_form(workload), row).all_steps == plan_conv2d(workload, row).all_steps
        )
        conv2d(tuned_form(workload), row, 1)
