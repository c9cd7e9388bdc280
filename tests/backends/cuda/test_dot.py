"""int8 convolution by dp4a: grouped, and of few outputs."""

from __future__ import annotations

import pytest

from graphopt.backends.cuda.dot import has_few_outputs
from tests.backends.cuda.harness import ConvCase, conv_workload

POINT = {"kernel": (1, 1), "padding": (0, 0), "size": (1, 1)}


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((24, 36), groups=4),
        conv_workload((16, 8), groups=2, residual=True),
        conv_workload((12, 12), size=(9, 9), groups=4, stride=(2, 2), dilation=(1, 2)),
        conv_workload((10, 20), groups=10),
        conv_workload((6, 9), groups=3, batch=None),
        conv_workload((3, 5), size=(20, 3)),
        conv_workload((24, 36), groups=4, residual=True, dtype="int8", x_zero_point=-100),
        conv_workload((6, 9), groups=3, batch=None, dtype="int8", x_zero_point=-1),
    ],
    ids=[
        *("aligned", "residual", "threes", "multiplied", "dynamic", "dense"),
        *("signed", "signed threes"),
    ],
)
def test_grouped(workload: object) -> None:
    case = ConvCase(workload)  # type: ignore[arg-type]
    assert not has_few_outputs(case.workload)
    assert (case.by_dot() == case.expected()).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("channels", [(70, 40), (256, 33), (5, 3)])
def test_slices_of_one_output(channels: tuple[int, int], floats: bool, dtype: str) -> None:
    workload = conv_workload(channels, batch=1, floats=floats, dtype=dtype, **POINT)  # type: ignore[arg-type]
    case = ConvCase(workload, batch=1)
    assert has_few_outputs(case.workload)
    assert (case.by_dot() == case.expected()).all()


def test_slices_of_a_small_map_with_a_residual() -> None:
    case = ConvCase(conv_workload((36, 20), size=(2, 3), residual=True))
    assert has_few_outputs(case.workload)
    assert (case.by_dot() == case.expected()).all()
