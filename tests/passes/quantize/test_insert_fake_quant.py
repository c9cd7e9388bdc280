"""Where fake quantization goes, and what it makes of the numbers."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import QuantizeError
from graphopt.passes.quantize import (
    ActivationSpec,
    InsertFakeQuant,
    Override,
    QuantizationSpec,
    WeightSpec,
)
from graphopt.passes.quantize.regions import is_fake_quantize
from tests.passes.quantize.nets import (
    activation_quantizers,
    capture,
    chain,
    conv,
    data,
    declines,
    insert,
)


def test_a_layer_reads_fake_quantized_input_and_weight():
    program = insert(capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8)))
    layer = next(n for n in program.graph.nodes if ops.is_op(n, "conv2d"))
    weight = layer.args[1]
    assert chain(program) == ["fq", "conv2d"]
    assert layer.args[0].args[3:] == (0, 255)
    assert weight.target is torch.ops.aten.fake_quantize_per_channel_affine.default
    assert weight.args[3:] == (0, -127, 127)
    scale, zero_point = (program.tensor(a) for a in weight.args[1:3])
    assert not scale.requires_grad
    assert zero_point.dtype == torch.int32
    assert not zero_point.any()
    largest = program.tensor(weight.args[0]).abs().amax(dim=(1, 2, 3))
    assert torch.equal(scale, (largest.double() / 127).float())


def test_scales_are_float32_values():
    program = insert(capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8)))
    scale = activation_quantizers(program)[0].args[1]
    assert scale == float(torch.tensor(scale, dtype=torch.float32))


@pytest.mark.parametrize(
    "clamp",
    [torch.relu, nn.functional.relu6, nn.functional.hardtanh, lambda x: x.clamp(0, 3)],
    ids=["relu", "relu6", "hardtanh", "clamp"],
)
def test_a_clamp_shares_the_layers_fake_quantization(clamp):
    def body(m, x):
        return m.b(clamp(m.a(x)))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    names = chain(program)
    assert names[:2] == ["fq", "conv2d"]
    assert names[3:] == ["fq", "conv2d"]


def test_a_clamp_of_a_value_read_twice_keeps_its_own():
    def body(m, x):
        a = m.a(x)
        return m.b(torch.relu(a)) + m.c(a)

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4), c=conv(8, 4)))
    assert chain(program) == ["fq", "conv2d", "fq", "relu", "fq", "conv2d", "conv2d", "add"]


def test_a_residual_add_has_three_scales_and_a_fused_relu():
    def body(m, x):
        a = torch.relu(m.a(x))
        return m.c(torch.relu(m.b(a) + a))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)))
    assert chain(program) == [
        *("fq", "conv2d", "relu", "fq", "conv2d", "fq", "add", "relu", "fq", "conv2d")
    ]
    assert len({n.args[1] for n in activation_quantizers(program)}) == 4


def test_the_input_of_a_seed_supports_an_add():
    def body(m, x):
        return m.b(x + m.a(x))

    program = insert(capture(body, 1, 4, 8, 8, a=conv(4, 4), b=conv(4, 2)))
    assert chain(program) == ["fq", "conv2d", "fq", "add", "fq", "conv2d"]


def test_concat_shares_one_scale_with_its_inputs():
    def body(m, x):
        return m.c(torch.cat([m.a(x), torch.relu(m.b(x)) * 1.0, m.d(x)], 1))

    layers = {"a": conv(3, 8), "b": conv(3, 4), "d": conv(3, 5), "c": conv(17, 4)}
    program = insert(capture(body, 1, 3, 8, 8, **layers))
    concat = next(n for n in program.graph.nodes if ops.is_op(n, "concat"))
    assert all(is_fake_quantize(v) for v in concat.args[0])
    assert len({v.args[1:3] for v in concat.args[0]}) == 1
    assert chain(program)[-2:] == ["concat", "conv2d"]


def test_max_pool_and_copies_need_no_fake_quantization_of_their_own():
    def body(m, x):
        y = nn.functional.pad(nn.functional.max_pool2d(torch.relu(m.a(x)), 2), (1, 1, 1, 1))
        left, right = y.chunk(2, 1)
        y = torch.cat([right, left], 1).permute(0, 2, 3, 1)[:, ::2].permute(0, 3, 1, 2)
        return m.b(y).flatten(1)

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    assert chain(program).count("fq") == 2


def test_average_pooling_has_its_own_scale_unless_shared():
    def body(m, x):
        return m.b(nn.functional.avg_pool2d(torch.relu(m.a(x)), 2).mean((2, 3)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=nn.Linear(8, 4))
    own = activation_quantizers(insert(program))
    assert len(own) == 4
    assert len({n.args[1] for n in own}) == 4
    spec = QuantizationSpec(shared=(*QuantizationSpec().shared, "avg_pool2d", "mean"))
    shared = activation_quantizers(insert(program, spec=spec))
    assert len(shared) == 4
    assert len({n.args[1] for n in shared}) == 2


def test_what_stands_before_a_float_operator_is_not_quantized():
    def body(m, x):
        return m.b(nn.functional.hardswish(m.a(x)))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    assert chain(program) == ["fq", "conv2d", "hardswish", "fq", "conv2d"]


def test_float_readers_of_a_float_value_keep_it_unquantized():
    def body(m, x):
        y = nn.functional.silu(x)
        return m.a(y), torch.sigmoid(y)

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    sigmoid = next(n for n in program.graph.nodes if ops.is_op(n, "sigmoid"))
    assert ops.is_op(sigmoid.args[0], "silu")


def test_float_readers_of_an_integer_value_read_it_quantized():
    def body(m, x):
        y = m.a(x)
        return m.b(y), torch.sigmoid(y)

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    sigmoid = next(n for n in program.graph.nodes if ops.is_op(n, "sigmoid"))
    assert is_fake_quantize(sigmoid.args[0])


def test_operators_between_float_operators_stay_float():
    def body(m, x):
        y = nn.functional.max_pool2d(torch.sigmoid(m.a(x)), 2)
        return torch.tanh(y + y)

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    assert chain(program) == ["fq", "conv2d", "sigmoid", "max_pool2d", "add", "tanh"]
    assert declines(program)["max_pool2d"] == "stands between float operators"


def test_a_pad_of_the_input_is_done_in_integers():
    def body(m, x):
        return m.a(nn.functional.pad(x, (0, 1, 0, 1)))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    assert chain(program) == ["fq", "pad", "conv2d"]


def test_a_shared_weight_is_quantized_once():
    def body(m, x):
        return m.a(torch.relu(m.a(x)))

    program = insert(capture(body, 1, 4, 8, 8, a=conv(4, 4)))
    layers = [n for n in program.graph.nodes if ops.is_op(n, "conv2d")]
    assert layers[0].args[1] is layers[1].args[1]


def test_a_masked_weight_is_quantized_after_its_mask():
    def body(m, x):
        return nn.functional.linear(x, m.a.weight * (m.a.weight > 0), m.a.bias)

    program = insert(capture(body, 2, 8, a=nn.Linear(8, 4)))
    layer = next(n for n in program.graph.nodes if ops.is_op(n, "linear"))
    assert ops.is_op(layer.args[1].args[0], "mul")
    assert program.history[-1].error < 0.02  # int8 noise on outputs of order 1


def test_weights_per_tensor_use_the_per_tensor_form():
    spec = QuantizationSpec(weights=WeightSpec(per_channel=False))
    program = insert(capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8)), spec=spec)
    weight = next(n for n in program.graph.nodes if ops.is_op(n, "conv2d")).args[1]
    assert weight.target is torch.ops.aten.fake_quantize_per_tensor_affine.default
    assert weight.args[2:] == (0, -127, 127)


def test_overrides_set_bits_by_layer():
    spec = QuantizationSpec(
        overrides=(Override("b", weights=WeightSpec(bits=4), activations=ActivationSpec(bits=6)),)
    )

    def body(m, x):
        return m.c(torch.relu(m.b(m.a(x))))

    layers = {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}
    program = insert(capture(body, 1, 3, 8, 8, **layers), spec=spec)
    found = [n for n in program.graph.nodes if ops.is_op(n, "conv2d")]
    assert [n.args[1].args[-2:] for n in found] == [(-127, 127), (-7, 7), (-127, 127)]
    assert [n.args[0].args[-1] for n in found] == [255, 255, 63]


@pytest.mark.parametrize("name", ["b", "conv2d_1", "conv2d_[1]"])
def test_declines_an_excluded_layer(name):
    spec = QuantizationSpec(exclude=(name,))

    def body(m, x):
        return m.b(m.a(x))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)), spec=spec)
    assert chain(program) == ["fq", "conv2d", "conv2d"]
    assert declines(program) == {"conv2d_1": "excluded by the spec"}


def test_declines_an_excluded_operator():
    spec = QuantizationSpec(exclude=("linear",))
    program = insert(capture(lambda m, x: m.a(x), 2, 8, a=nn.Linear(8, 4)), spec=spec)
    assert program.history[-1].rewrites == 0
    assert declines(program) == {"linear": "excluded by the spec"}


def test_declines_a_weight_that_depends_on_the_input():
    program = insert(capture(lambda m, x: nn.functional.linear(x, x), 4, 4))
    assert declines(program) == {"linear": "the weight is computed from the input"}


def test_declines_a_bias_that_depends_on_the_input():
    program = insert(
        capture(lambda m, x: nn.functional.linear(x, m.a.weight, x[0]), 4, 4, a=nn.Linear(4, 4))
    )
    assert declines(program)["linear"] == "the bias is computed from the input"


def test_declines_another_dtype():
    layer = nn.Linear(4, 4).double()
    program = go.capture(layer, (torch.randn(2, 4, dtype=torch.float64),))
    program = InsertFakeQuant(calibration=program.example_inputs)(program)
    assert declines(program) == {"linear": "computes in float64"}


def test_declines_an_unfolded_batch_norm():
    def body(m, x):
        return m.b(torch.relu(m.n(m.a(x))))

    layers = {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 4)}
    program = insert(capture(body, 1, 3, 8, 8, **layers))
    assert chain(program) == ["fq", "conv2d", "batch_norm", "relu", "fq", "conv2d"]
    assert declines(program)["batch_norm"] == "stays in float after conv2d: fold batch norm first"


@pytest.mark.parametrize(
    ("middle", "node", "reason"),
    [
        (lambda y: y + 1.0, "add", "adds a number or scales an operand"),
        (
            lambda y: nn.functional.adaptive_avg_pool2d(y, 3),
            "adaptive_avg_pool2d",
            "its windows differ in size",
        ),
        (
            lambda y: y.mean(3, keepdim=True),
            "mean",
            "only the mean over height and width has an integer form",
        ),
        (
            lambda y: nn.functional.pad(y, (1, 1), value=1.0),
            "pad",
            "pads with something other than 0",
        ),
    ],
)
def test_declines_calls_without_an_integer_form(middle, node, reason):
    def body(m, x):
        return m.b(middle(m.a(x)))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4, 1)))
    assert declines(program)[node] == reason


def test_the_numbers_hold():
    def body(m, x):
        return m.c(torch.relu(m.b(torch.relu(m.a(x))) + m.a(x)).mean((2, 3)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 8), c=nn.Linear(8, 4))
    batches = data(program, 16)
    quantized = InsertFakeQuant(calibration=batches)(program)
    with torch.no_grad():
        noise = sum(float((program(x) - quantized(x)).square().sum()) for x in batches)
        signal = sum(float(program(x).square().sum()) for x in batches)
    assert 0 < noise < 1e-3 * signal  # 30 dB: 8 bits leave about 40 a layer


@pytest.mark.parametrize("observer", ["minmax", "moving-average", "percentile", "mse", "entropy"])
def test_a_second_run_rewrites_nothing(observer):
    def body(m, x):
        return m.b(torch.relu(m.a(x)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4))
    once = insert(program, observer=observer)
    twice = insert(once, observer=observer)
    assert once.history[-1].rewrites > 0
    assert twice.history[-1].rewrites == 0
    assert declines(twice)["conv2d"] == "already fake-quantized"


def test_a_float_layer_can_be_quantized_later():
    def body(m, x):
        return m.b(torch.relu(m.a(x)))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4))
    part = insert(program, spec=QuantizationSpec(exclude=("b",)))
    both = insert(part)
    assert chain(both) == chain(insert(program))


def test_zero_channels_and_their_biases_survive():
    layer = conv(3, 4)
    with torch.no_grad():
        layer.weight[1:3] = 0
        layer.weight[3] = 1e-20
        layer.bias.copy_(torch.tensor([0.1, 0.2, 3.0, 5.0]))
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=layer)
    quantized = insert(program)
    found = next(n for n in quantized.graph.nodes if ops.is_op(n, "conv2d"))
    product = quantized.tensor(found.args[1].args[1]).double() * found.args[0].args[1]
    steps = layer.bias.detach().double() / product
    assert (steps.abs() < 2**31 - 1).all()
    assert ((steps.round() * product - layer.bias.detach()).abs() <= product / 2 + 1e-12).all()
    x = program.example_inputs[0]
    assert torch.allclose(quantized(x)[:, 1:], program(x)[:, 1:], atol=1e-6)


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_bad_weights_name_tensor_and_layer(role):
    layer = conv(3, 8)
    with torch.no_grad():
        getattr(layer, role).view(-1)[3] = float("nan")
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=layer)
    with pytest.raises(QuantizeError) as error:
        insert(program)
    assert str(error.value) == (
        f"insert-fake-quant: tensor 'a.{role}' of node 'conv2d' (layer 'a') holds NaN; "
        f"mend the {role} before quantization"
    )


def test_the_input_program_is_untouched():
    program = capture(lambda m, x: m.a(x), 1, 3, 8, 8, a=conv(3, 8))
    before = str(program.graph)
    insert(program)
    assert str(program.graph) == before
