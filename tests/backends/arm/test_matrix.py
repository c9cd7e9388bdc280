"""Matrix products (``usmmla``): equal to the definition on shapes that fill no block, and chosen where they multiply less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm

from graphopt.backends.arm.isa import DOTPROD, I8MM, ISAS
from graphopt.backends.cpu.candidates import candidates
from graphopt.backends.cpu.conv import conv2d, pack_conv2d
from graphopt.backends.cpu.conv_plan import ConvChoice, plan_conv2d
from graphopt.backends.cpu.peak import peak_kernel, peak_operations
from graphopt.backends.cpu.workload import Conv2d, Epilogue
from graphopt.errors import CompileError
from tests.backends.arm.machine import needs_qemu
from tests.backends.cpu.conv_harness import (
    REQUANTIZE,
    RESIDUAL_ADD,
    check_exact,
    conv_workload,
    random_data,
)
from tests.backends.cpu.test_conv import SHAPES

MATRIX = I8MM.dense("uint8")[-1]  # the row that multiplies by nothing else
RESIDUAL = Epilogue(requantize=REQUANTIZE, residual_add=RESIDUAL_ADD)
LINE: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}

ODD: dict[str, Conv2d] = {
    "1 channel": conv_workload((1, 5), (5, 7)),
    "1 channel in 4": conv_workload((1, 6), (5, 7), x_channel_stride=4),
    "3 channels, 7 x 7 / 2": conv_workload(
        (3, 10), (15, 15), (7, 7), (2, 2), (3, 3), x_channel_stride=4
    ),
    "12 channels": conv_workload((12, 12), (4, 5), y_margin=1),
    "13 channels": conv_workload((13, 9), (4, 5)),
    "29 channels, residual": conv_workload((29, 15), (3, 7), epilogue=RESIDUAL, y_margin=1),
    "groups of 7 to 5": conv_workload((14, 10), (4, 5), groups=2),
    "linear, one row": conv_workload((100, 37), (1, 1), **LINE),
    "linear, three rows, residual": conv_workload((52, 23), (1, 3), epilogue=RESIDUAL, **LINE),
    "batch of 3": conv_workload((24, 21), (3, 3), batch=3),
    "batch of 3 in line": conv_workload((24, 21), (3, 3), batch=3, **LINE),
    "dequantized": conv_workload((20, 11), (5, 5), epilogue=Epilogue()),
}


@needs_qemu
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_equal_the_definition(name: str) -> None:
    check_exact(ODD[name], MATRIX)


@pytest.mark.slow
@needs_qemu
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_equals_the_definition(name: str) -> None:
    check_exact(SHAPES[name], MATRIX)


@needs_qemu
@pytest.mark.parametrize(
    "tile", [(1, 1), (1, 7), (2, 3), (3, 2), (4, 4), (5, 2), (6, 3), (13, 1)], ids=str
)
def test_any_tile_equals_the_definition(tile: tuple[int, int]) -> None:
    """Odd pixels leave half a block, last tiles overlap, last blocks are narrower."""
    assert tile in MATRIX.tiles("uint8")
    channels = 4 * tile[1] * 2 + 5
    workload = conv_workload((44, channels), (2, 16), (1, 2), padding=(0, 0), epilogue=RESIDUAL)
    check_exact(workload, MATRIX, choice=ConvChoice(*tile))


@needs_qemu
def test_a_dynamic_batch_of_fewer_rows_than_a_tile() -> None:
    workload = conv_workload((72, 24), (1, 1), batch=None, **LINE)
    for batch in (1, 2, 3, 17):
        check_exact(workload, MATRIX, batch=batch)


@needs_qemu
@pytest.mark.parametrize("sign", [127, -128])
def test_nothing_saturates(sign: int) -> None:
    workload = conv_workload((512, 6), (3, 3), epilogue=Epilogue())
    data = random_data(workload)
    extreme = replace(
        data,
        x=np.full_like(data.x, 255),
        weight=np.full_like(data.weight, sign),
        multiplier=np.full_like(data.multiplier, 2.0**-10),
    )
    check_exact(workload, MATRIX, data=extreme)


def _instructions(workload: Conv2d, row) -> str:
    return str(tvm.compile(conv2d(workload, row, 1), target=row.target()).mod.inspect_source("s"))


@pytest.mark.parametrize("row", [I8MM, ISAS["graviton3"]], ids=lambda row: row.name)
def test_chosen_where_steps_are_long(row) -> None:
    for workload in (
        conv_workload((64, 64), (56, 56)),
        conv_workload((128, 512), (28, 28), **LINE),
        conv_workload((3, 64), (224, 224), (7, 7), (2, 2), (3, 3), x_channel_stride=4),
    ):
        assert plan_conv2d(workload, row).isa.form == "matrix"
        assert plan_conv2d(workload, DOTPROD).isa is DOTPROD
    assembly = _instructions(conv_workload((64, 64), (14, 14)), row)
    assert "usmmla" in assembly
    assert "usdot" not in assembly


def test_groups_of_four_channels_keep_their_dot_products() -> None:
    """A step of 8 would be half zeros."""
    workload = conv_workload((32, 32), (8, 8), groups=8)
    assert plan_conv2d(workload, I8MM).isa is I8MM
    assert "usdot" in _instructions(workload, I8MM)


def test_a_choice_takes_the_form_that_its_tile_fits() -> None:
    workload = conv_workload((64, 64), (1, 40), **LINE)
    matrix, both, dot = ConvChoice(6, 3), ConvChoice(8, 2), ConvChoice(10, 2)
    forms = [plan_conv2d(workload, I8MM, choice).isa.form for choice in (matrix, both, dot)]
    assert forms == ["matrix", "matrix", "dot"]
    with pytest.raises(CompileError, match=r"cannot be cut by ConvChoice\(pixels=12, vectors=4"):
        plan_conv2d(workload, I8MM, ConvChoice(12, 4))
    for choice in candidates(workload, I8MM):
        assert plan_conv2d(workload, I8MM, choice).isa.form == "matrix"


def test_weights_of_a_block_are_two_channels_of_eight() -> None:
    workload = conv_workload((16, 4), (1, 8), **LINE)
    weight = np.arange(64, dtype=np.int8).reshape(4, 16, 1, 1)
    packed = pack_conv2d(workload, MATRIX, weight, None, np.ones(4, np.float32))[0]
    first = packed.reshape(-1, 2, 8)[0]  # one register: step 0, channels 0 and 1
    assert first.tolist() == [list(range(8)), list(range(16, 24))]


def test_the_peak_is_that_of_matrices() -> None:
    kernel = tvm.compile(peak_kernel(I8MM, "uint8"), target=I8MM.target())
    assert "usmmla" in kernel.mod.inspect_source("s")
    assert peak_operations(I8MM, "uint8") == 2 * peak_operations(DOTPROD, "uint8")
    assert peak_operations(I8MM, "float32") == peak_operations(DOTPROD, "float32")
