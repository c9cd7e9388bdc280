"""The float form of an integer layer, the estimate of both, and their comparison on this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphopt.backends.cpu.rivals import Rivals, estimate, rivals
from graphopt.backends.cpu.versus import Job, run
from graphopt.backends.cpu.workload import Add, Conv2d, Convert, Epilogue, Layout, Requantize
from graphopt.backends.x86.isa import ISAS
from tests.backends.cpu.conv_harness import REQUANTIZE, RESIDUAL_ADD, conv_workload
from tests.backends.cpu.stream_harness import ROWS

ROW = ROWS[-1].name


def _first_layer(channels: int, outputs: int, size: int, kernel: int) -> Rivals:
    """The first convolution of a network on images of ``channels``."""
    margin = kernel // 2
    x = Layout(1, size, size, channels, "uint8", margin, margin, margin, margin, channel_stride=4)
    y = Layout(1, size, size, outputs, "uint8", channel_stride=-(-outputs // 4) * 4)
    window = {"kernel": (kernel, kernel), "padding": (margin, margin)}
    workload = Conv2d(x, y, **window, epilogue=Epilogue(Requantize(0, 0, 255)))  # type: ignore[arg-type]
    return rivals(workload, sums_fit=True)


def _ratio(layer: Rivals, row: str) -> float:
    """Float over int8."""
    cycles = estimate(layer, ISAS[row], threads=1)
    assert cycles is not None
    return cycles[1] / cycles[0]


def test_the_float_form_has_its_borders() -> None:
    layer = rivals(conv_workload((8, 16), epilogue=Epilogue(REQUANTIZE, RESIDUAL_ADD)), False)
    dequantize, float32, quantize, add = layer.float32
    assert isinstance(dequantize, Convert)
    assert isinstance(float32, Conv2d)
    assert isinstance(quantize, Convert)
    assert isinstance(add, Add)
    assert (dequantize.x, dequantize.y) == (layer.int8.x, float32.x)
    assert (quantize.x, quantize.y) == (float32.y, layer.int8.y)
    assert float32.x.dtype == float32.y.dtype == "float32"
    assert float32.residual is None
    assert add.b == layer.int8.residual


def test_a_layer_that_ends_in_float_needs_no_quantize() -> None:
    workload = conv_workload((8, 16), epilogue=Epilogue())
    assert [type(call) for call in rivals(workload, False).float32] == [Convert, Conv2d]


def test_the_numbers_of_a_calibration_do_not_count() -> None:
    workload = conv_workload((8, 16), epilogue=Epilogue(Requantize(7, 3, 200)))
    other = replace(workload, epilogue=Epilogue(Requantize(9, 5, 190)))
    assert rivals(workload, False).key == rivals(other, False).key
    assert rivals(workload, False).key != rivals(workload, True).key


def test_one_channel_and_few_outputs_are_faster_in_float() -> None:
    """LeNet-5's first layer: measured 0.54 of the int8 time on AVX2, 0.64 on SSE4, 0.94 on AVX-512 VNNI."""
    layer = _first_layer(1, 6, 32, 5)
    assert _ratio(layer, "avx2") < 0.75
    assert _ratio(layer, "sse4") < 0.75
    assert _ratio(layer, "avx512-vnni") > 0.75


@pytest.mark.parametrize("row", ["avx512-vnni", "avx2", "sse4"])
def test_usual_layers_are_faster_in_integers(row: str) -> None:
    assert _ratio(_first_layer(3, 64, 224, 7), row) > 1
    assert _ratio(rivals(conv_workload((64, 64), size=(28, 28)), True), row) > 1


def test_depthwise_layers_have_no_estimate() -> None:
    workload = conv_workload((16, 16), groups=16)
    assert estimate(rivals(workload, False), ISAS[ROW], threads=1) is None


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("epilogue", [Epilogue(REQUANTIZE), Epilogue(REQUANTIZE, RESIDUAL_ADD)])
def test_times_both(groups: int, epilogue: Epilogue) -> None:
    layer = rivals(conv_workload((16, 16), groups=groups, epilogue=epilogue), sums_fit=True)
    result = run(Job(layer, ROW, 1, seconds=0.01))
    assert min(result.seconds, result.reference, result.ratio) > 0
