"""What holds for every factorization: declines, history, provenance, training, recipes, data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.errors import CalibrationError, PassError, RecipeError
from tests.models import example
from tests.passes.factorize.layers import CONVOLUTIONS, PASSES, alone, gap, layers_of, planted
from tests.passes.helpers import captured, reasons, rewrites
from tests.passes.quantize.nets import capture, data


def fitting(name, **options):
    """A layer for a pass, and the shape of its input."""
    if name == "low-rank-linear":
        layer = planted(24, 20, (1, 1), **options)
    else:
        layer = planted(24, 20, **{"padding": 1, **options})
    return layer, (2, 24, 9, 8)


def network(name):
    layer, shape = fitting(name)
    return alone(layer, *shape)


@pytest.mark.parametrize("name", PASSES)
def test_a_layer_becomes_a_chain_and_a_second_run_changes_nothing(name):
    program = network(name)
    factored = PASSES[name](rank=1)(program)
    assert len(layers_of(program)) == 1
    assert len(layers_of(factored)) in (2, 3, 4)
    assert rewrites(factored) == 1
    again = PASSES[name](rank=1)(factored)
    assert rewrites(again) == 0
    expected = {"it is a factor already"}
    assert {r for r in reasons(again) if "kernel" not in r} == expected


@pytest.mark.parametrize("name", PASSES)
def test_history_counts_what_the_graph_holds(name):
    program = network(name)
    factored = PASSES[name](rank=2)(program)
    (change,) = factored.history[-1].layers
    bias = 20
    before, after = program.stats(), factored.stats()
    assert (change.node, change.layer) == ("conv2d", "layer")
    assert change.parameters == (before.parameters - bias, after.parameters - bias)
    assert change.macs == (before.macs, after.macs)
    assert change.text.startswith("rank 2")
    weight = program.tensor(layers_of(program)[0].args[1]).detach()
    delta = torch.zeros(1, 24, 9, 8)
    delta[0, 3, 4, 4] = 1.0  # the response to an impulse is one slice of the weight
    with torch.no_grad():
        seen = (factored(delta.repeat(2, 1, 1, 1)) - program(delta.repeat(2, 1, 1, 1)))[0].norm()
    assert change.error is not None
    assert float(seen) <= change.error * float(weight.norm()) + 1e-5


@pytest.mark.parametrize("name", PASSES)
def test_provenance_bias_and_training(name):
    program = network(name)
    factored = PASSES[name](rank=2)(program)
    nodes = layers_of(factored)
    assert all(node.meta["provenance"] == ("conv2d",) for node in nodes)
    assert all("nn_module_stack" in node.meta for node in nodes)
    biases = [ops.bind(node)["bias"] for node in nodes]
    assert biases[:-1] == [None] * (len(nodes) - 1)
    assert str(biases[-1].target) == "layer.bias"
    loss = factored(example(2, 24, 9, 8)).square().sum()
    loss.backward()
    parameters = dict(factored.graph_module.named_parameters())
    assert len(parameters) == len(nodes) + 1
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())


class Twice(nn.Module):
    """The same layer at two places."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


def square(name, **options):
    kernel = (1, 1) if name == "low-rank-linear" else (3, 3)
    return planted(24, 24, kernel, padding=kernel[0] // 2, **options)


@pytest.mark.parametrize("name", PASSES)
def test_a_shared_weight_is_declined(name):
    program = go.capture(Twice(square(name)).eval(), (example(1, 24, 6, 6),))
    factored = PASSES[name](rank=1)(program)
    assert rewrites(factored) == 0
    assert reasons(factored) == ["its weight layer.weight is shared by 2 layers"] * 2


@pytest.mark.parametrize("name", PASSES)
def test_computed_masked_and_fake_quantized_weights_are_declined(name):
    layer, shape = fitting(name)
    x, w = example(*shape), nn.Parameter(layer.weight.detach())
    mask = torch.ones_like(w)

    def computed(x, w):
        return torch.conv2d(x, w.tanh())

    def masked(x, w, w_mask):
        return torch.conv2d(x, w * w_mask)

    program = alone(layer, *shape)
    quantized = go.passes.InsertFakeQuant(calibration=data(program))(program)
    for given_program, reason in (
        (captured(computed, x, w=w), "its weight is computed"),
        (captured(masked, x, w=w, w_mask=mask), "its weight is masked by pruning"),
        (quantized, "its weight is fake-quantized; run this pass before quantization"),
    ):
        factored = PASSES[name](rank=1)(given_program)
        assert (rewrites(factored), reasons(factored)) == (0, [reason])
        assert factored.history[-1].notes == ("no layer to factor",)


@pytest.mark.parametrize("name", PASSES)
def test_groups_and_bad_weights_are_declined(name):
    kernel = (1, 1) if name == "low-rank-linear" else (3, 3)
    grouped = nn.Conv2d(24, 20, kernel, groups=4)
    factored = PASSES[name](rank=1)(alone(grouped, 1, 24, 6, 6))
    assert reasons(factored) == ["its 4 groups are matrices of their own"]
    layer, shape = fitting(name)
    layer.weight.data[1, 2] = float("nan")
    assert reasons(PASSES[name](rank=1)(alone(layer, *shape))) == [
        "its weight holds NaN or infinity"
    ]


@pytest.mark.parametrize("name", PASSES)
def test_a_rank_at_which_cost_grows_is_declined(name):
    program = network(name)
    factored = PASSES[name](rank=400)(program)
    assert rewrites(factored) == 0
    (reason,) = reasons(factored)
    assert " would grow from " in reason or "saves nothing" in reason


@pytest.mark.parametrize("name", PASSES)
def test_a_network_without_layers_comes_back_with_a_note(name):
    program = captured(lambda x: x.relu(), example(2, 3))
    factored = PASSES[name]()(program)
    assert factored.history[-1].notes == ("no layer to factor",)
    assert (rewrites(factored), factored.history[-1].layers) == (0, ())


@pytest.mark.parametrize("name", PASSES)
def test_layers_and_exclude(name):
    def body(m, x):
        return m.head(torch.relu(m.stem(x)))

    layers = {"stem": square(name), "head": square(name)}
    program = capture(body, 1, 24, 6, 6, **layers)
    for pass_ in (
        PASSES[name](rank=1, layers=("head",)),
        PASSES[name](rank=1, exclude=("st*",)),
    ):
        factored = pass_(program)
        assert [change.layer for change in factored.history[-1].layers] == ["head"]
        assert factored.history[-1].declines == ()


@pytest.mark.parametrize("name", PASSES)
def test_a_recipe_names_rank_and_line(name):
    recipe = go.Pipeline.from_text(f"passes:\n  - {name}: {{rank: {{macs: 0.9}}, layers: [layer]}}")
    factored = recipe(network(name))
    assert factored.history[-1].macs[1] <= 0.9 * factored.history[-1].macs[0]
    assert factored.history[-1].options["rank"] == {"macs": 0.9}
    with pytest.raises(RecipeError) as error:
        go.Pipeline.from_text(f"passes:\n  - {name}:\n      rank: {{energy: 9}}")
    assert str(error.value) == (
        f"recipe:2: {name}: energy of a rank must lie between 0 and 1, not at 9: the share that remains"
    )


@pytest.mark.parametrize("name", PASSES)
def test_bad_ranks_fail_at_once(name):
    with pytest.raises(PassError, match=f"^{name}: rank 'full' is none of: a number, vbmf"):
        PASSES[name](rank="full")
    with pytest.raises(PassError, match=f"^{name}: rows must be at least 1, not 0$"):
        PASSES[name](rows=0)


@pytest.mark.parametrize("name", PASSES)
def test_every_way_to_choose_a_rank(name):
    program = network(name)
    for rank in ({"energy": 0.5}, {"macs": 0.95}, {"parameters": 0.95}, "vbmf", 2):
        factored = PASSES[name](rank=rank)(program)
        record = factored.history[-1]
        assert record.rewrites or record.declines
        if isinstance(rank, dict) and record.rewrites:
            ((kind, share),) = rank.items()
            if kind == "energy":
                assert record.layers[0].error <= (1 - share) ** 0.5 + 0.02
            else:
                before, after = getattr(record, kind)
                assert after <= share * before


@pytest.mark.parametrize("name", PASSES)
def test_a_dynamic_batch_stays_dynamic(name):
    layer, shape = fitting(name)
    program = alone(layer, *shape, dynamic_batch=(1, 4))
    factored = PASSES[name](rank=2)(program)
    assert factored(example(3, *shape[1:])).shape[0] == 3


@pytest.mark.parametrize("name", PASSES)
def test_data_lowers_the_error_on_data(name):
    kernel = (1, 1) if name == "low-rank-linear" else (3, 3)
    layer = nn.Conv2d(24, 20, kernel, padding=kernel[0] // 2)
    layer.weight.data = example(*layer.weight.shape)
    program = alone(layer, 2, 24, 9, 8)
    mixing = example(24, 24, seed=1) / torch.arange(
        1, 25
    )  # inputs of a falling spectrum, not centred
    batches = [
        torch.einsum("nihw,oi->nohw", example(2, 24, 9, 8, seed=n) + 0.5, mixing) for n in range(8)
    ]
    plain = PASSES[name](rank=2)(program)
    fitted = PASSES[name](rank=2, calibration=batches[:6])(program)
    assert rewrites(plain) == rewrites(fitted) == 1

    def error(factored):
        with torch.no_grad():
            pairs = [(program(x), factored(x)) for x in batches[6:]]
        return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5

    assert error(fitted) < 0.8 * error(plain)


@pytest.mark.parametrize("bias", ["none", "shared", "computed"])
def test_the_mean_error_goes_to_a_bias_of_its_own(bias):
    """W x on inputs of mean 1: whatever the layer's bias is, the mean of the output stays."""
    x, w = example(400, 24, seed=1) + 1.0, nn.Parameter(example(20, 24))
    b = nn.Parameter(example(20, seed=2))

    def body(x, w, b):
        if bias == "none":
            return nn.functional.linear(x, w) + b
        if bias == "shared":
            return nn.functional.linear(x, w, b) + b
        return nn.functional.linear(x, w, b.tanh()) + b

    program = captured(body, x, w=w, b=b)
    factored = go.passes.LowRankLinear(rank=2, calibration=[x])(program)
    assert rewrites(factored) == 1
    with torch.no_grad():
        before, after = program(x), factored(x)
    assert float((before - after).norm() / before.norm()) > 0.1
    # sums of 400 in float32
    torch.testing.assert_close(before.mean(dim=0), after.mean(dim=0), atol=1e-4, rtol=0)
    assert torch.equal(factored.graph_module.get_parameter("b"), b)


@pytest.mark.parametrize("name", ["low-rank-linear", "tucker-conv"])
def test_data_that_is_missing_or_bad_is_an_error(name):
    program = network(name)
    with pytest.raises(CalibrationError) as error:
        PASSES[name](rank=2, calibration=[])(program)
    assert str(error.value) == f"{name}: the calibration data holds no batch"
    with pytest.raises(CalibrationError, match="holds NaN in input"):
        PASSES[name](rank=2, calibration=[torch.full((2, 24, 9, 8), float("nan"))])(program)


@pytest.mark.parametrize("name", PASSES)
def test_the_same_seed_gives_the_same_bits(name):
    program = network(name)
    batches = data(program)
    x = example(2, 24, 9, 8)
    with torch.no_grad():
        runs = [PASSES[name](rank=1, calibration=batches, rows=50, seed=s)(program)(x) for s in (0, 0, 1)]  # fmt: skip
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@settings(max_examples=12)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@given(
    kernel=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
)
def test_any_geometry(name, kernel, stride, padding, dilation, bias):
    # strides would make a 1 x 1 convolution before the stride cost more: enough outputs keep it cheap
    layer = planted(16, 40, kernel, 1, stride=stride, padding=padding, dilation=dilation, bias=bias)
    program = alone(layer, 1, 16, 10, 11)
    factored = PASSES[name](rank=1)(program)
    assert rewrites(factored) == 1
    # one term is exact in every factorization, CP up to its ridge of 1e-4 of the energy
    assert gap(program, factored) < (5e-3 if name in ("cp-conv", "flattened-conv") else 2e-6)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_padding_by_name(name):
    layer = planted(16, 24, (3, 5), 1, padding="same", dilation=(2, 1))
    program = alone(layer, 1, 16, 10, 11)
    factored = PASSES[name](rank=1)(program)
    assert rewrites(factored) == 1
    assert gap(program, factored) < (5e-3 if name in ("cp-conv", "flattened-conv") else 2e-6)


@pytest.mark.parametrize("name", ["tucker-conv", "cp-conv", "depthwise-separable"])
def test_one_dimension(name):
    layer = nn.Conv1d(16, 24, 5, stride=2, padding=2)
    parts = example(24, 1), example(16, 1, seed=1), example(5, 1, seed=2)
    layer.weight.data = torch.einsum("or,ir,tr->oit", *parts)
    program = alone(layer, 2, 16, 31)
    factored = PASSES[name](rank=1)(program)
    assert rewrites(factored) == 1
    assert gap(program, factored) < (5e-3 if name == "cp-conv" else 2e-6)


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        ("low-rank-linear", (3, 3), "its kernel is 3 x 3; spatial-svd, tucker-conv or cp-conv factor it"),
        ("spatial-svd", (1, 3), "its kernel is 1 x 3: there is nothing to separate"),
        ("tucker-conv", (1, 1), "a 1 x 1 kernel is a matrix; low-rank-linear factors it"),
        ("cp-conv", (1, 1), "a 1 x 1 kernel is a matrix; low-rank-linear factors it"),
        ("flattened-conv", (3, 1), "its kernel is 3 x 1: it is flat already"),
        ("depthwise-separable", (1, 1), "a 1 x 1 kernel is pointwise already"),
    ],
)  # fmt: skip
def test_kernels_that_do_not_fit_are_declined(name, kernel, reason):
    factored = PASSES[name](rank=1)(alone(nn.Conv2d(16, 20, kernel), 1, 16, 6, 6))
    assert (rewrites(factored), reasons(factored)) == (0, [reason])


def test_restarts_are_at_least_one():
    with pytest.raises(PassError) as error:
        go.passes.CpConv(restarts=0)
    assert str(error.value) == "cp-conv: restarts must be at least 1, not 0"
