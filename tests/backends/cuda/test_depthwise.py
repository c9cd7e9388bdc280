"""Depthwise int8 convolution."""

from __future__ import annotations

import pytest

from graphopt.backends.cuda.depthwise import is_depthwise
from tests.backends.cuda.harness import ConvCase, conv_workload


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((10, 10), groups=10),
        conv_workload(
            (12, 12), groups=12, kernel=(5, 5), stride=(2, 2), padding=(2, 2), size=(9, 11)
        ),
        conv_workload((8, 8), groups=8, dilation=(1, 2), residual=True),
        conv_workload((4, 4), groups=4, kernel=(9, 11), padding=(4, 5), size=(10, 12)),
        conv_workload((4, 4), groups=4, size=(3, 9), batch=None),
        conv_workload(
            (4, 4), groups=4, y_more={"channel_stride": 12, "first_channel": 4, "shared": True}
        ),
        conv_workload((10, 10), groups=10, residual=True, dtype="int8", x_zero_point=-100),
        conv_workload((9, 9), groups=9, floats=True),
    ],
    ids=["odd", "strided", "residual", "large", "dynamic", "slice", "signed", "floats"],
)
def test_equals_the_definition(workload: object) -> None:
    case = ConvCase(workload)  # type: ignore[arg-type]
    assert is_depthwise(case.workload)
    assert (case.by_depthwise() == case.expected()).all()
