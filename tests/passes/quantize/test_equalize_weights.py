"""Cross-layer equalization."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.passes.quantize import EqualizeWeights, QuantizationSpec, WeightSpec
from tests.passes.quantize.nets import capture, conv, data, declines


def uneven(layer, seed=0):
    """Scale a layer's output channels by factors that differ a thousandfold; the factors."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (3 * torch.rand(layer.weight.shape[0], generator=generator) - 1.5)
    with torch.no_grad():
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(scale)
    return scale


def mobile(activation=torch.relu):
    def body(m, x):
        return m.c(activation(m.b(activation(m.a(x)))))

    a, b, c = conv(3, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
    first, second = uneven(a, 0), uneven(b, 1)
    with torch.no_grad():  # the next layer takes the factors back: only quantization sees them
        b.weight.div_(first.reshape(-1, 1, 1, 1))
        c.weight.div_(second.reshape(1, -1, 1, 1))
    return capture(body, 1, 3, 8, 8, a=a, b=b, c=c)


def layers_of(program):
    return [n for n in program.graph.nodes if ops.is_op(n, "conv2d", "linear")]


def weight(program, index):
    return program.tensor(layers_of(program)[index].args[1])


def test_ranges_become_equal_and_the_function_stays():
    program = mobile()
    equal = EqualizeWeights()(program)
    assert equal.history[-1].rewrites == 5
    for first, second in ((0, 1), (1, 2)):
        rows = weight(equal, first).abs().flatten(1).amax(1)
        axis = (1, 2, 3) if second == 1 else (0, 2, 3)
        columns = weight(equal, second).abs().amax(axis)
        assert torch.allclose(rows, columns, rtol=0.05)  # both scales within 2 % of 1
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    reference = program(x).detach()
    assert torch.allclose(equal(x).detach(), reference, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions(groups):
    def body(m, x):
        return m.b(nn.functional.max_pool2d(m.a(x), 2))

    first = conv(4, 8)
    uneven(first)
    program = capture(body, 1, 4, 8, 8, a=first, b=conv(8, 4, groups=groups))
    equal = EqualizeWeights()(program)
    assert equal.history[-1].rewrites == 3
    assert equal.history[-1].error == pytest.approx(0.0, abs=1e-5)  # float32 sums, reordered


def test_linear_layers():
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 4)}
    uneven(layers["a"])
    program = capture(lambda m, x: m.b(nn.functional.leaky_relu(m.a(x))), 2, 6, **layers)
    assert EqualizeWeights()(program).history[-1].rewrites == 3


def test_quantization_per_tensor_gets_better():
    program = mobile()
    spec = QuantizationSpec(weights=WeightSpec(per_channel=False))

    def noise(start):
        quantized = go.passes.InsertFakeQuant(spec=spec, calibration=data(program))(start)
        with torch.no_grad():
            return sum(float((quantized(x) - program(x)).square().sum()) for x in data(program))

    assert noise(EqualizeWeights()(program)) < 0.2 * noise(program)


def test_a_channel_of_zeros_is_left_alone():
    first = conv(3, 8)
    with torch.no_grad():
        first.weight[2] = 0
    program = capture(lambda m, x: m.b(torch.relu(m.a(x))), 1, 3, 8, 8, a=first, b=conv(8, 4))
    equal = EqualizeWeights()(program)
    assert torch.equal(weight(equal, 1)[:, 2], weight(program, 1)[:, 2])


def test_a_second_run_rewrites_nothing():
    once = EqualizeWeights()(mobile())
    assert EqualizeWeights()(once).history[-1].rewrites == 0


@pytest.mark.parametrize("clamp", [nn.functional.relu6, nn.functional.hardtanh])
def test_declines_what_does_not_scale(clamp):
    program = EqualizeWeights()(mobile(clamp))
    assert program.history[-1].rewrites == 0
    reason = "ReLU6 does not scale with its input: set replace_relu6 to put a ReLU there"
    expected = {"conv2d": reason, "conv2d_1": reason} if clamp is nn.functional.relu6 else {}
    assert declines(program) == expected


def test_relu6_is_replaced_on_request():
    program = EqualizeWeights(replace_relu6=True)(mobile(nn.functional.relu6))
    assert [n for n in program.graph.nodes if ops.is_op(n, "hardtanh", "relu6")] == []
    assert program.history[-1].rewrites == 7
    assert program.history[-1].contract == "lossy"


def test_declines_a_value_read_twice():
    def body(m, x):
        a = m.a(x)
        return m.b(a) + a

    program = capture(body, 1, 4, 8, 8, a=conv(4, 4), b=conv(4, 4))
    assert EqualizeWeights()(program).history[-1].rewrites == 0


def test_declines_a_shared_weight():
    program = capture(lambda m, x: m.a(torch.relu(m.a(x))), 1, 4, 8, 8, a=conv(4, 4))
    program = EqualizeWeights()(program)
    assert declines(program) == {"conv2d": "the weight of conv2d is shared"}


def test_declines_a_computed_weight():
    def body(m, x):
        return m.b(nn.functional.conv2d(x, m.a.weight * 2, m.a.bias))

    program = EqualizeWeights()(capture(body, 1, 4, 8, 8, a=conv(4, 4), b=conv(4, 4)))
    assert declines(program) == {"conv2d": "the weight of conv2d is computed"}


def test_declines_a_fake_quantized_weight():
    program = mobile()
    quantized = go.passes.InsertFakeQuant(
        calibration=data(program), spec=QuantizationSpec(exclude=("a",))
    )(program)
    equal = EqualizeWeights()(quantized)
    assert equal.history[-1].rewrites == 0
    assert declines(equal) == {}
