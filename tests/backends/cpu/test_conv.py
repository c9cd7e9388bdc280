"""conv2d: integer kernels equal the definition bit for bit on every row of this CPU; float kernels agree with float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.backends.cpu.conv import conv2d, function_name, pack_conv2d
from graphopt.backends.cpu.conv_plan import ConvChoice
from graphopt.backends.cpu.workload import Conv2d, Epilogue, Layout
from graphopt.errors import CompileError
from tests.backends.cpu.conv_harness import (
    REQUANTIZE,
    RESIDUAL_ADD,
    Data,
    check_close,
    check_exact,
    conv_workload,
    random_data,
    reference,
)
from tests.backends.cpu.stream_harness import ROWS, pack

RESIDUAL = Epilogue(requantize=REQUANTIZE, residual_add=RESIDUAL_ADD)

SHAPES: dict[str, Conv2d] = {
    "3x3 with margins": conv_workload((16, 64), (14, 14), y_margin=1),
    "first layer": conv_workload(
        (3, 5), (15, 15), (7, 7), (2, 2), (3, 3), x_channel_stride=4, y_channel_stride=8
    ),
    "odd width, 1000 channels": conv_workload((8, 1000), (3, 13), (1, 1), padding=(0, 0)),
    "residual": conv_workload((24, 40), (6, 7), (1, 1), padding=(0, 0), epilogue=RESIDUAL),
    "residual, partial lanes, margins": conv_workload(
        (8, 13), (5, 5), epilogue=RESIDUAL, y_margin=1, y_channel_stride=16
    ),
    "strided 1x1 of a tensor with margins": conv_workload(
        (16, 24), (9, 9), (1, 1), (2, 2), (0, 0), x_extra=1
    ),
    "asymmetric, dilated": conv_workload(
        (8, 20), (11, 13), (3, 5), (2, 1), (2, 3), (2, 2), y_margin=2
    ),
    "x channel stride wider than channels": conv_workload((5, 9), (6, 6), x_channel_stride=16),
    "groups of 4": conv_workload((32, 32), (8, 8), groups=8),
    "groups of 5 to 17": conv_workload((15, 51), (6, 5), groups=3),
    "groups of 1 to 2, two channels": conv_workload((2, 4), (5, 5), groups=2),
    "groups of 24 to 40": conv_workload((48, 80), (5, 5), groups=2, kernel=(1, 1), padding=(0, 0)),
    "unpadded channels": conv_workload((3, 7), (5, 5)),
    "linear": conv_workload((512, 100), (1, 1), (1, 1), padding=(0, 0)),
    "linear over 37 tokens": conv_workload((64, 48), (1, 37), (1, 1), padding=(0, 0)),
    "dequantized": conv_workload((16, 33), (5, 5), epilogue=Epilogue()),
    "dequantized, residual": conv_workload(
        (64, 41), (1, 9), (1, 1), padding=(0, 0), epilogue=Epilogue(float_residual=True)
    ),
    "one pixel": conv_workload((8, 16), (1, 1)),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_definition(name: str, row) -> None:
    check_exact(SHAPES[name], row)


@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("tile", [(1, 1), (4, 2), (2, 3), (11, 1)])
def test_every_choice_computes_the_same(tile: tuple[int, int], chunk: int) -> None:
    choice = ConvChoice(*tile, chunk)
    workload = conv_workload((8, 56), (3, 13), epilogue=RESIDUAL, y_margin=1)
    check_exact(workload, ROWS[0], threads=2, choice=choice)
    flat = conv_workload((8, 56), (3, 3), (1, 1), padding=(0, 0), batch=None)
    for batch in (1, 3):
        check_exact(flat, ROWS[0], batch=batch, choice=choice)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("tile", [(2, 1), (7, 1), (5, 2), (7, 3), (3, 4), (2, 5)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=str)
def test_any_tile_finishes_its_pixels(tile: tuple[int, int], kernel: tuple[int, int], row) -> None:
    """Epilogues beside the next tile's steps, packs across pixels, partial vectors, a last tile that overlaps."""
    narrow = replace(REQUANTIZE, qmin=7, qmax=201)
    for epilogue in (Epilogue(requantize=narrow), RESIDUAL):
        channels = row.lanes * tile[1] * 2 + 5
        workload = conv_workload((12, channels), (5, 9), kernel, padding=(0, 0), epilogue=epilogue)
        if tile in row.tiles("uint8"):
            check_exact(workload, row, choice=ConvChoice(*tile))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("shift", [3, 9, 20])
def test_residual_sums_of_any_scale(row, shift: int) -> None:
    """Sums that no vector of words holds, and shifts at which rounding by adding is not exact."""
    multipliers = {"a_multiplier": 2_000_001, "b_multiplier": -1_999_999}
    add = replace(RESIDUAL_ADD, shift=shift, **multipliers)
    epilogue = Epilogue(requantize=REQUANTIZE, residual_add=add)
    check_exact(conv_workload((8, row.lanes * 4), (6, 6), epilogue=epilogue), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_dynamic_batch(row) -> None:
    workload = conv_workload((8, 24), (5, 6), epilogue=RESIDUAL, y_margin=1, batch=None)
    check_exact(workload, row, batch=3)
    flat = conv_workload((8, 24), (3, 3), (1, 1), padding=(0, 0), batch=None)
    check_exact(flat, row, batch=3)
    linear = conv_workload((64, 24), (1, 1), (1, 1), padding=(0, 0), batch=None)
    for batch in (1, 2, 31):
        check_exact(linear, row, batch=batch)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int) -> None:
    for workload in (
        conv_workload((16, 80), (9, 9), epilogue=RESIDUAL, y_margin=1, batch=2),
        conv_workload((16, 8), (9, 9), (1, 1), padding=(0, 0), batch=None),
    ):
        check_exact(workload, ROWS[0], threads, batch=2)
    assert "T.parallel" in conv2d(SHAPES["linear"], ROWS[0], threads).script()
    assert "T.parallel" not in conv2d(SHAPES["linear"], ROWS[0], 1).script()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("sign", [127, -128])
def test_nothing_saturates(row, sign: int) -> None:
    """x 255 and weights 127: a pair is 64,770, twice what vpmaddubsw holds; the sums pass 2**26."""
    workload = conv_workload((512, 20), (3, 3), epilogue=Epilogue())
    data = random_data(workload)
    extreme = Data(
        np.full_like(data.x, 255),
        np.full_like(data.weight, sign),
        data.bias,
        np.full_like(data.multiplier, 2.0**-10),
        data.residual,
    )
    check_exact(workload, row, data=extreme)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_results_far_outside_int32_are_clamped(row) -> None:
    workload = conv_workload((64, 20), (3, 3))
    data = random_data(workload)
    wild = replace(data, multiplier=np.full_like(data.multiplier, 3e30))
    check_exact(workload, row, data=wild)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ties_round_to_even(row) -> None:
    """Multiplier 1/2 on odd sums: every result is a tie."""
    workload = conv_workload((4, 16), (4, 4), (1, 1), padding=(0, 0))
    data = random_data(workload)
    ties = replace(
        data,
        weight=np.concatenate([np.ones((16, 1, 1, 1)), np.zeros((16, 3, 1, 1))], 1).astype(np.int8),
        bias=np.zeros_like(data.bias),
        multiplier=np.full_like(data.multiplier, 0.5),
    )
    assert set(np.unique(reference(workload, ties) % 2)) == {0.0, 1.0}
    check_exact(workload, row, data=ties)


FLOAT_SHAPES = {
    "3x3": conv_workload((16, 40), (9, 14), dtype="float32", y_margin=1, y_channel_stride=43),
    "first layer": conv_workload((3, 24), (12, 12), stride=(2, 2), dtype="float32"),
    "residual": conv_workload(
        (7, 13), (5, 5), (1, 1), padding=(0, 0), dtype="float32",
        epilogue=Epilogue(float_residual=True),
    ),
    "groups": conv_workload((12, 18), (5, 5), groups=3, dtype="float32", dilation=(2, 2), padding=(2, 2)),
    "linear": conv_workload((300, 70), (1, 5), (1, 1), padding=(0, 0), dtype="float32"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", FLOAT_SHAPES)
def test_float_agrees_with_float64(name: str, row) -> None:
    check_close(FLOAT_SHAPES[name], row)


def test_float_dynamic_batch_and_threads() -> None:
    workload = conv_workload((6, 20), (5, 5), dtype="float32", batch=None)
    check_close(workload, ROWS[0], threads=2, batch=3)


@st.composite
def workloads(draw: st.DrawFn) -> Conv2d:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    height, width = (
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 12))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    channels = (groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 40)))
    integer = draw(st.booleans())
    epilogue = draw(st.sampled_from([Epilogue(requantize=REQUANTIZE), RESIDUAL, Epilogue()]))
    if not integer:
        epilogue = draw(st.sampled_from([Epilogue(), Epilogue(float_residual=True)]))
    return conv_workload(
        channels,
        (height, width),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding,
        dilation,
        groups,
        "uint8" if integer else "float32",
        epilogue=epilogue,
        batch=draw(st.sampled_from([1, 2, None])),
        x_channel_stride=channels[0] + draw(st.integers(0, 4)),
        y_margin=draw(st.integers(0, 1)),
        y_channel_stride=channels[1] + draw(st.integers(0, 3)),
        x_extra=draw(st.integers(0, 1)),
    )


@settings(max_examples=25, deadline=None)
@given(workloads(), st.sampled_from(ROWS), st.integers(1, 2))
def test_random_workloads(workload: Conv2d, row, threads: int) -> None:
    check = check_exact if workload.x.dtype == "uint8" else check_close
    check(workload, row, threads, batch=2)


def test_called_from_relax_with_a_dynamic_batch() -> None:
    workload = conv_workload((8, 40), (9, 9), y_margin=1, batch=None)
    row = ROWS[0]
    data = random_data(workload, batch=3)
    packed = pack_conv2d(workload, row, data.weight, data.bias, data.multiplier)
    function = conv2d(workload, row, 1)
    x, y = workload.x, workload.y
    n = tvm.tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    kernel = builder.add_func(function, function.attrs["global_symbol"])
    x_shape = (n, x.rows, x.columns, x.channel_stride)
    argument = relax.Var("x", relax.TensorType(x_shape, x.dtype))
    with builder.function("main", [argument]):
        with builder.dataflow():
            constants = [relax.const(array) for array in packed]
            out = relax.TensorType((n, y.rows, y.columns, y.channel_stride), y.dtype)
            call = builder.emit(relax.call_tir(kernel, [argument, *constants], out))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    pipeline = relax.get_default_pipeline(row.target())
    executable = tvm.compile(builder.get(), row.target(), relax_pipeline=pipeline)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    expected = pack(y, reference(workload, data).astype(np.uint8))
    for batch in (1, 3):
        x_array = tvm.runtime.tensor(pack(x, data.x)[:batch])
        np.testing.assert_array_equal(machine["main"](x_array).numpy(), expected[:batch])


def test_name_is_legible_and_blind_to_zero_points() -> None:
    workload = conv_workload((64, 128), (56, 56), stride=(2, 2))
    name = function_name(workload, ROWS[0], 1)
    assert name.startswith("conv2d_u8s8_3x3s2_56x56x64_128_")
    x = replace(workload.x, fill=99)
    assert function_name(replace(workload, x=x, x_zero_point=99), ROWS[0], 1) == name
    y = replace(workload.y, fill=99)
    others = [
        function_name(replace(workload, y=y), ROWS[0], 1),
        function_name(workload, ROWS[-1], 1),
        function_name(workload, ROWS[0], 2),
        function_name(workload, ROWS[0], 1, ConvChoice(14, 2)),
        function_name(workload, ROWS[0], 1, ConvChoice(14, 2, chunk=1)),
    ]
    assert len({name, *others}) == 6


def test_refuses_an_input_without_its_margins() -> None:
    workload = conv_workload((8, 8), (5, 5))
    with pytest.raises(CompileError) as caught:
        conv2d(replace(workload, x=Layout(1, 5, 5, 8, "uint8")), ROWS[0], 1)
    assert str(caught.value) == (
        "conv2d 3x3 reads outside its input's margins; give x margins of at least "
        "top 1, left 1, bottom 1, right 1"
    )


def test_refuses_inconsistent_workloads() -> None:
    workload = conv_workload((8, 8), (5, 5))
    with pytest.raises(CompileError, match="cannot split 8 -> 8 channels into 3 groups"):
        conv2d(replace(workload, groups=3), ROWS[0], 1)
    with pytest.raises(CompileError, match="uint8 -> float32 does not fit its epilogue"):
        conv2d(replace(workload, y=replace(workload.y, dtype="float32")), ROWS[0], 1)
    with pytest.raises(CompileError, match="takes uint8 or float32 activations, not int8"):
        conv2d(replace(workload, x=replace(workload.x, dtype="int8")), ROWS[0], 1)
    with pytest.raises(CompileError, match="residual layout without a residual epilogue"):
        conv2d(replace(workload, residual=workload.y), ROWS[0], 1)
    data = random_data(workload)
    with pytest.raises(CompileError, match=r"weight has shape \(8, 8, 3, 3\), its workload says"):
        pack_conv2d(replace(workload, kernel=(1, 1)), ROWS[0], data.weight, None, data.multiplier)
    weight = data.weight.view(np.uint8)
    with pytest.raises(CompileError, match="takes an int8 weight, not uint8"):
        pack_conv2d(workload, ROWS[0], weight, None, data.multiplier)
    with pytest.raises(CompileError, match="takes a multiplier for each output channel"):
        pack_conv2d(workload, ROWS[0], data.weight, None, None)
