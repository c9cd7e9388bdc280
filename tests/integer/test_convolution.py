"""``graphopt::conv2d`` and ``linear`` against ONNX Runtime, onnx.reference and 64-bit integers."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from graphopt.errors import IntegerizeError
from tests.integer.oracles import onnx_model, onnx_runtime

graphopt = torch.ops.graphopt
ONES = [1, 1]
NONE = [0, 0, 0, 0]


def _bytes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def _weights(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


def _onnx_conv_inputs(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, m: torch.Tensor, x_zp: int, y_zp: int
) -> list[Any]:
    """QLinearConv's operands; scales of x and y are powers of two so that m is exact whatever the order."""
    return [
        x.numpy(),
        numpy.float32(0.5),
        numpy.uint8(x_zp),
        w.numpy(),
        m.numpy() * numpy.float32(4),
        numpy.zeros(len(m), numpy.int8),
        numpy.float32(2.0),
        numpy.uint8(y_zp),
        bias.numpy(),
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conv2d_equals_onnx_runtime(data: st.DataObject) -> None:
    draw = data.draw
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = [draw(st.integers(1, 3)) for _ in "hw"]
    dilation = [draw(st.integers(1, 2)) for _ in "hw"]
    padding = [draw(st.integers(0, 3)) for _ in "tlbr"]
    groups = draw(st.sampled_from([1, 2, 4]))
    x_zp, y_zp = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = _bytes(generator, draw(st.integers(1, 2)), 2 * groups, 9, 8)
    w = _weights(generator, 3 * groups, 2, *kernel)
    bias = torch.randint(-9000, 9000, (3 * groups,), generator=generator).to(torch.int32)
    m = torch.rand(3 * groups, generator=generator) * 4e-3 + 1e-5
    y = graphopt.conv2d(x, w, bias, m, stride, padding, dilation, groups, x_zp, y_zp, 0, 255)
    inputs = _onnx_conv_inputs(x, w, bias, m, x_zp, y_zp)
    attributes: dict[str, Any] = {
        "strides": stride,
        "pads": padding,
        "dilations": dilation,
        "group": groups,
    }
    expected = onnx_runtime("QLinearConv", inputs, "uint8", **attributes)
    assert numpy.array_equal(y.numpy(), expected)


def test_depthwise_conv2d_equals_onnx_runtime() -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = _bytes(generator, 2, 40, 13, 11), _weights(generator, 40, 1, 5, 3)
    bias = torch.randint(-9000, 9000, (40,), generator=generator).to(torch.int32)
    m = torch.rand(40, generator=generator) * 4e-3
    y = graphopt.conv2d(x, w, bias, m, [2, 1], [2, 1, 2, 1], ONES, 40, 77, 200, 0, 255)
    inputs = _onnx_conv_inputs(x, w, bias, m, 77, 200)
    attributes = {"strides": [2, 1], "pads": [2, 1, 2, 1], "group": 40}
    expected = onnx_runtime("QLinearConv", inputs, "uint8", **attributes)
    assert numpy.array_equal(y.numpy(), expected)


def test_conv2d_rounds_ties_to_even_and_clamps() -> None:
    x = torch.tensor([1, 3, 5, 7, 9, 250], dtype=torch.uint8).reshape(1, 1, 1, 6)
    w = torch.ones(2, 1, 1, 1, dtype=torch.int8)
    w[1] = -1
    bias, m = torch.zeros(2, dtype=torch.int32), torch.full((2,), 0.5)
    y = graphopt.conv2d(x, w, bias, m, ONES, NONE, ONES, 1, 0, 10, 4, 100)
    assert y[0, :, 0].tolist() == [[10, 12, 12, 14, 14, 100], [10, 8, 8, 6, 6, 4]]


def test_padding_holds_the_zero_point() -> None:
    x = torch.full((1, 1, 2, 2), 50, dtype=torch.uint8)
    w = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    bias, m = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    y = graphopt.conv2d(x, w, bias, m, ONES, [0, 1, 1, 2], ONES, 1, 48, 0, 0, 255)
    assert y.flatten().tolist() == [8, 8, 4]


def test_conv2d_dequantize_is_the_exact_accumulator_times_the_multiplier() -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = _bytes(generator, 2, 600, 3, 3), _weights(generator, 7, 600, 3, 3)
    bias = torch.randint(-(10**6), 10**6, (7,), generator=generator).to(torch.int32)
    m = torch.rand(7, generator=generator)
    y = graphopt.conv2d_dequantize(x, w, bias, m, ONES, NONE, ONES, 1, 128)
    columns = (x.to(torch.int64) - 128).flatten(1)
    acc = columns @ w.to(torch.int64).flatten(1).T + bias
    assert torch.equal(y.flatten(1), acc.to(torch.float32) * m)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 255), st.integers(0, 2**31))
def test_linear_equals_onnx_runtime_and_the_reference(k: int, o: int, zero: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = _bytes(generator, 3, k), _weights(generator, o, k)
    # onnx.reference multiplies in float64 and adds the zero point before rounding: exact products and an even zero
    # point make the two orders comparable.
    bias, m = torch.zeros(o, dtype=torch.int32), torch.full((o,), 3 / 1024)
    y = graphopt.linear(x, w, bias, m, zero, 98, 0, 255)
    scale = m.numpy()[0] * numpy.float32(4)
    operands: list[Any] = [x.numpy(), numpy.float32(0.5), numpy.uint8(zero), w.numpy().T.copy()]
    operands += [scale, numpy.int8(0), numpy.float32(2.0), numpy.uint8(98)]
    assert numpy.array_equal(y.numpy(), onnx_runtime("QLinearMatMul", operands, "uint8"))
    model = onnx_model("QLinearMatMul", operands, "uint8")
    feeds = {f"x{i}": numpy.asarray(value) for i, value in enumerate(operands)}
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    assert numpy.array_equal(y.numpy(), results[0])


def test_linear_keeps_leading_dimensions_and_adds_the_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = _bytes(generator, 2, 5, 11), _weights(generator, 4, 11)
    bias = torch.tensor([0, 1000, -1000, 7], dtype=torch.int32)
    m = torch.tensor([0.001, 0.002, 0.003, 0.004])
    acc = (x.to(torch.int64) - 9) @ w.to(torch.int64).T + bias
    real = acc.to(torch.float32) * m
    assert torch.equal(graphopt.linear_dequantize(x, w, bias, m, 9), real)
    y = graphopt.linear(x, w, bias, m, 9, 30, 0, 255)
    assert torch.equal(y, torch.clamp(torch.round(real) + 30, 0, 255).to(torch.uint8))


@pytest.mark.parametrize(
    ("bias", "fits"), [(2**31 - 1 - 255 * 127, True), (2**31 - 255 * 127, False)]
)
def test_accumulators_beyond_int32_are_refused(bias: int, fits: bool) -> None:
    x = torch.full((1, 1), 255, dtype=torch.uint8)
    w = torch.full((1, 1), 127, dtype=torch.int8)
    arguments = (x, w, torch.tensor([bias], dtype=torch.int32), torch.ones(1), 0)
    if fits:
        assert graphopt.linear_dequantize(*arguments).item() == 2.0**31
        return
    message = (
        "^the accumulator of output channel 0 can reach 2147483648, beyond int32; "
        "split the layer's input channels or keep it in float$"
    )
    with pytest.raises(IntegerizeError, match=message):
        graphopt.linear_dequantize(*arguments)


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)
    w = torch.zeros(2, 4, 3, 3, dtype=torch.int8)
    b, m = torch.zeros(2, dtype=torch.int32), torch.ones(2)

    def conv(x=x, w=w, b=b, m=m, stride=ONES, padding=NONE, groups=1):
        return graphopt.conv2d(x, w, b, m, stride, padding, ONES, groups, 0, 0, 0, 255)

    for message, call in (
        ("x must be [N, C, H, W], not of rank 3", lambda: conv(x=x[0])),
        ("x must be of 8 channels, not 4", lambda: conv(groups=2)),
        ("groups must be a divisor of 2, not 3", lambda: conv(groups=3)),
        ("weight must be int8, not torch.float32", lambda: conv(w=w.float())),
        ("bias must be int32, not torch.int64", lambda: conv(b=b.long())),
        ("multiplier must be of shape (2,)", lambda: conv(m=torch.ones(3))),
        ("stride must be two positive numbers", lambda: conv(stride=[0, 1])),
        ("padding must be (top, left, bottom, right), none negative", lambda: conv(padding=[1, 1])),
        ("the padded x must be as large as the kernel", lambda: conv(x=x[:, :, :2])),
        ("every multiplier must be finite and positive", lambda: conv(m=m * 0)),
        ("every multiplier must be finite and positive", lambda: conv(m=m * float("nan"))),
    ):
        with pytest.raises(IntegerizeError) as caught:
            call()
        assert str(caught.value) == f"graphopt::conv2d: {message}"
