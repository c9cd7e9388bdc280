"""A trial on this machine; that over RPC is in ``tests/tuning/test_rpc.py``."""

from __future__ import annotations

import pytest

from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.trial import Job, run
from graphopt.backends.cpu.workload import Epilogue
from graphopt.errors import CompileError
from graphopt.tuning.protocol import Unmeasurable
from tests.backends.cpu.conv_harness import REQUANTIZE, RESIDUAL_ADD, conv_workload
from tests.backends.cpu.stream_harness import ROWS

ROW = ROWS[-1].name


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_times_both(dtype: str) -> None:
    residual = Epilogue(REQUANTIZE, RESIDUAL_ADD)
    epilogue = residual if dtype == "uint8" else Epilogue(float_residual=True)
    workload = conv_workload((8, 16), dtype=dtype, epilogue=epilogue)
    result = run(Job(workload, ROW, 1, ConvChoice(2, 1), seconds=0.01))
    assert result.seconds > 0
    assert result.reference > 0
    assert result.ratio > 0


def test_tells_whose_fault_it_is() -> None:
    workload = conv_workload((8, 16))
    with pytest.raises(CompileError):
        run(Job(workload, ROW, 1, ConvChoice(100, 1), seconds=0.01))
    with pytest.raises(Unmeasurable):
        run(Job(conv_workload((8, 16), groups=3), ROW, 1, ConvChoice(1, 1), seconds=0.01))
