"""Where a region of integers ends: at a layer, or at an average over the whole map."""

import pytest
import torch
from torch import nn

from graphopt import ops
from graphopt.passes.quantize import QuantizationSpec
from graphopt.passes.quantize.regions import is_fake_quantize
from tests.passes.quantize.nets import capture, chain, conv, declines, insert

GLOBAL_AVERAGES = [
    lambda y: nn.functional.adaptive_avg_pool2d(y, 1),
    lambda y: y.mean((2, 3)),
    lambda y: y.mean((-1, -2), keepdim=True),
]


@pytest.mark.parametrize("pool", GLOBAL_AVERAGES)
@pytest.mark.parametrize("ending", [lambda y: y, torch.sigmoid, lambda y: y.flatten(1)])
def test_an_average_over_the_whole_map_ends_a_region(pool, ending):
    """SqueezeNet's tail: the classifier's relu and the average's input are quantized, its result is not."""

    def body(m, x):
        return ending(pool(torch.relu(m.a(nn.functional.dropout(x, 0.5, False)))))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    names = [name for name in chain(program) if name != "dropout"]
    assert names[:4] == ["fq", "conv2d", "relu", "fq"]
    assert names[4] in ("adaptive_avg_pool2d", "mean")
    assert "fq" not in names[5:]
    assert not {"relu", "mean", "adaptive_avg_pool2d"} & set(declines(program))


def test_what_an_ending_average_reads_joins_in_turn():
    """A network of features: the last residual add, and a concat of them, are integer up to the average."""

    def body(m, x):
        a = torch.relu(m.a(x))
        b = torch.relu(m.b(a) + a)
        return torch.cat([a, b], 1).mean((2, 3))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 8)))
    names = chain(program)
    assert names[-2:] == ["concat", "mean"]
    add = next(n for n in program.graph.nodes if ops.is_op(n, "add"))
    concat = next(n for n in program.graph.nodes if ops.is_op(n, "concat"))
    assert all(is_fake_quantize(v) for v in (*add.all_input_nodes, *concat.args[0]))


def test_two_averages_of_one_map_both_end_it():
    def body(m, x):
        y = torch.relu(m.a(x))
        return y.mean((2, 3)), torch.sigmoid(nn.functional.adaptive_avg_pool2d(y, 1))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    assert chain(program) == [
        "fq",
        "conv2d",
        "relu",
        "fq",
        "mean",
        "adaptive_avg_pool2d",
        "sigmoid",
    ]


def test_a_map_that_is_quantized_anyway_is_averaged_as_integers():
    def body(m, x):
        y = torch.relu(m.a(x))
        return m.b(y), torch.sigmoid(y), y.mean((2, 3))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    mean = next(n for n in program.graph.nodes if ops.is_op(n, "mean"))
    assert is_fake_quantize(mean.args[0])
    assert chain(program).count("fq") == 2
    assert "mean" not in declines(program)


def test_the_map_of_a_gate_stays_float_with_its_average():
    """The float product reads the map itself: quantizing it would cost accuracy and one more pass."""

    def body(m, x):
        y = torch.relu(m.a(x))
        return m.b(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8), b=conv(8, 4)))
    assert chain(program) == ["fq", "conv2d", "relu", "mean", "sigmoid", "mul", "fq", "conv2d"]
    assert declines(program)["mean"] == "stands between float operators"


def test_a_gate_with_layers_reads_an_average_of_integers():
    """Squeeze-and-excite: the average is read by a layer, so it is quantized on both sides."""

    def body(m, x):
        y = torch.relu(m.a(x))
        gate = torch.sigmoid(m.c(nn.functional.adaptive_avg_pool2d(y, 1)))
        return m.b(y * gate)

    layers = {"a": conv(3, 8), "b": conv(8, 4), "c": conv(8, 8, 1)}
    program = insert(capture(body, 1, 3, 8, 8, **layers))
    pool = next(n for n in program.graph.nodes if ops.is_op(n, "adaptive_avg_pool2d"))
    assert is_fake_quantize(pool.args[0])
    assert all(is_fake_quantize(user) for user in pool.users)


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: nn.functional.adaptive_avg_pool2d(y, 2),
        lambda y: nn.functional.avg_pool2d(y, 2),
        lambda y: nn.functional.max_pool2d(y, 8),
        lambda y: y.mean(1),
    ],
)
def test_nothing_else_ends_a_region(pool):
    program = insert(capture(lambda m, x: pool(torch.relu(m.a(x))), 1, 3, 8, 8, a=conv(3, 8)))
    assert chain(program).count("fq") == 1


@pytest.mark.parametrize("source", [nn.functional.silu, lambda x: x])
def test_an_average_of_a_float_map_stays_float(source):
    def body(m, x):
        y = source(x)
        return m.a(y), y.mean((2, 3))

    program = insert(capture(body, 1, 3, 8, 8, a=conv(3, 8)))
    mean = next(n for n in program.graph.nodes if ops.is_op(n, "mean"))
    assert not is_fake_quantize(mean.args[0])
    assert declines(program)["mean"] == "stands between float operators"


def test_an_average_of_one_pixel_is_a_copy_and_ends_nothing():
    def body(m, x):
        return nn.functional.adaptive_avg_pool2d(m.a(x), 1)

    program = insert(capture(body, 1, 3, 3, 3, a=nn.Conv2d(3, 8, 3)))
    assert chain(program) == ["fq", "conv2d", "adaptive_avg_pool2d"]


def test_an_average_taken_out_of_the_spec_stays_float():
    def body(m, x):
        return torch.relu(m.a(x)).mean((2, 3))

    program = capture(body, 1, 3, 8, 8, a=conv(3, 8))
    excluded = insert(program, spec=QuantizationSpec(exclude=("mean",)))
    assert chain(excluded) == ["fq", "conv2d", "relu", "mean"]
    assert declines(excluded)["mean"] == "excluded by the spec"
