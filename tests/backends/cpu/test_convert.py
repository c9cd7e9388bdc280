"""convert: every direction, every row of this CPU, against the definition in NumPy, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.backends.cpu.convert import convert
from graphopt.backends.cpu.workload import Activation, Convert, Layout, Requantize
from graphopt.errors import CompileError
from tests.backends.cpu.stream_harness import ROWS, pack, random_map, round_and_clamp, run

ROUNDING = Requantize(zero_point=7, qmin=0, qmax=255)


def reference(workload: Convert, logical: np.ndarray) -> np.ndarray:
    scale = np.float32(workload.scale)
    if logical.dtype == np.float32 and workload.y.dtype == "float32":
        return np.maximum(logical, 0) if workload.activation else logical
    if logical.dtype == np.float32:
        value = logical * scale
    elif workload.requantize is None and workload.y.dtype != "float32":
        return logical
    else:
        value = (logical.astype(np.int32) - workload.x_zero_point).astype(np.float32) * scale
    if workload.requantize is None:
        return np.maximum(value, 0) if workload.activation else value
    return round_and_clamp(value, workload.requantize).astype(workload.y.dtype)


def check(workload: Convert, row, threads: int = 1, batch: int = 1) -> None:
    logical = random_map(workload.x, seed=3, batch=batch)
    expected = pack(workload.y, reference(workload, logical), workload.y_order)
    x = pack(workload.x, logical, workload.x_order)
    actual = run(convert(workload, row, threads), row, x, out=expected)
    np.testing.assert_array_equal(actual, expected)


def between(height, width, channels, source, target, **fields) -> tuple[Layout, Layout]:
    batch = fields.pop("batch", 1)
    x = Layout(batch, height, width, channels, source)
    return x, Layout(batch, height, width, channels, target, **fields)


MARGINS = {"top": 2, "bottom": 1, "left": 1, "right": 3, "fill": 7}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize(("channels", "stride"), [(1, 1), (2, 2), (3, 3), (3, 4), (4, 4), (7, 12)])
def test_quantizes_nchw_into_margins(row, channels, stride):
    x, y = between(5, 21, channels, "float32", "uint8", channel_stride=stride, **MARGINS)
    check(Convert(x, y, "nchw", "nhwc", 0.75, requantize=ROUNDING), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("channels", [1, 3, 25])
def test_dequantizes_margins_into_nchw(row, channels):
    y, x = between(5, 21, channels, "float32", "uint8", channel_stride=channels + 2, **MARGINS)
    check(Convert(x, y, "nhwc", "nchw", 0.37, x_zero_point=7), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_requantizes_and_relays(row):
    x, y = between(4, 9, 13, "uint8", "uint8", channel_stride=16, **MARGINS)
    check(Convert(x, y, scale=1.7, x_zero_point=40, requantize=ROUNDING), row)
    check(Convert(x, y), row)
    check(Convert(replace(y, fill=0), x), row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_quantizing_sends_nan_and_infinity_to_the_bounds(row):
    rounding = Requantize(zero_point=100, qmin=3, qmax=250)
    x, y = between(1, 1, 40, "float32", "uint8")
    special = [np.nan, -np.nan, np.inf, -np.inf, 1e30, -1e30, 0.5, 1.5, 2.5, -0.5]
    logical = np.array(special * 4, np.float32).reshape(1, 40, 1, 1)
    expected = np.array([3, 3, 250, 3, 250, 3, 100, 102, 102, 100] * 4, np.uint8)
    workload = Convert(x, y, scale=1.0, requantize=rounding)
    actual = run(
        convert(workload, row, 1), row, pack(x, logical), out=pack(y, np.zeros(logical.shape))
    )
    assert actual.ravel().tolist() == expected.tolist()


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["float32", "uint8"]),
    st.sampled_from(["float32", "uint8"]),
    st.sampled_from(["nhwc", "nchw"]),
    st.sampled_from(["nhwc", "nchw"]),
    st.integers(0, 2),
    st.sampled_from(ROWS),
)
@settings(max_examples=30, deadline=None)
@example(3, 7, 7, 1000, "uint8", "float32", "nhwc", "nchw", 0, ROWS[0])
@example(1, 1, 1, 1000, "uint8", "float32", "nhwc", "nhwc", 0, ROWS[0])
@example(2, 7, 1, 9, "float32", "uint8", "nchw", "nhwc", 1, ROWS[-1])
def test_random_shapes(batch, height, width, channels, source, target, come, go, margin, row):
    frame = {"top": margin, "left": margin, "right": 1, "fill": 7}
    x = Layout(batch, height, width, channels, source, **(frame if come == "nhwc" else {}))
    y = Layout(batch, height, width, channels, target, **(frame if go == "nhwc" else {}))
    rounding = ROUNDING if target == "uint8" else None
    check(Convert(x, y, come, go, 0.61, 11, rounding), row)


def test_dynamic_batch_and_threads():
    x, y = between(6, 5, 3, "float32", "uint8", batch=None, channel_stride=4, **MARGINS)
    for threads in (1, 2):
        workload = Convert(x, y, "nchw", "nhwc", 0.75, requantize=ROUNDING)
        check(workload, ROWS[0], threads, batch=3)
    assert "T.parallel" in convert(workload, ROWS[0], 2).script()
    assert "T.parallel" not in convert(workload, ROWS[0], 1).script()


def test_activation_on_the_way_out():
    x, y = between(3, 3, 18, "uint8", "float32")
    check(Convert(x, y, scale=0.5, x_zero_point=99, activation=Activation("relu")), ROWS[0])


def test_names_differ_by_what_shapes_the_code():
    x, y = between(3, 3, 18, "uint8", "float32")
    names = [
        convert(workload, ROWS[0], 1).attrs["global_symbol"]
        for workload in (
            Convert(x, y, scale=0.5),
            Convert(x, y, scale=0.25),
            Convert(replace(x, fill=9), y, scale=0.5),
        )
    ]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("dequantize_3x3x18_nhwc_nhwc_")


def test_declines_a_change_of_shape():
    x, y = Layout(1, 2, 2, 4, "uint8"), Layout(1, 2, 2, 5, "uint8")
    with pytest.raises(CompileError, match="changes the logical shape"):
        convert(Convert(x, y), ROWS[0], 1)
    with pytest.raises(CompileError, match="no rounding"):
        convert(Convert(replace(x, dtype="float32"), x), ROWS[0], 1)
    with pytest.raises(CompileError, match="nchw and has margins"):
        convert(Convert(replace(x, top=1), x, x_order="nchw"), ROWS[0], 1)


def test_runs_in_a_relax_module():
    x, y = between(4, 4, 3, "float32", "uint8", batch=None, channel_stride=4)
    workload = Convert(x, y, "nchw", "nhwc", 0.75, requantize=ROUNDING)
    relax = tvm.relax
    builder = relax.BlockBuilder()
    batch = tvm.tirx.Var("n", "int64")
    value = relax.Var("x", relax.TensorType((batch, 3, 4, 4), "float32"))
    with builder.function("main", [value]):
        kernel = builder.add_func(convert(workload, ROWS[0], 1), "kernel")
        out = relax.TensorType((batch, 4, 4, 4), "uint8")
        builder.emit_func_output(builder.emit(relax.call_tir(kernel, [value], out)))
    module = tvm.compile(builder.get(), target=ROWS[0].target())
    machine = relax.VirtualMachine(module, tvm.cpu())
    logical = random_map(x, 5, batch=2)
    actual = machine["main"](tvm.runtime.tensor(logical)).numpy()
    np.testing.assert_array_equal(actual, pack(y, reference(workload, logical)))
