"""The rewrite to float16: what is multiplied, stored and rounded, and where; the numbers; what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt import ops
from graphopt.backends.cuda.autocast import Kind, is_cast, kind_of
from graphopt.backends.cuda.cast_to_float16 import CastToFloat16, kept_in_float32
from graphopt.backends.integerize import integerize
from graphopt.preparation import simplified
from tests.random_graphs import random_model

HALF = torch.float16


def _program(model: nn.Module, *inputs: Tensor, **options: tuple[int, int]) -> go.Program:
    return simplified(go.capture(model.eval(), inputs, **options))


def _types(program: go.Program) -> list[tuple[str, str]]:
    """The calls other than casts, with the element type that readers find them in."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or is_cast(node):
            continue
        casts = [u for u in node.users if is_cast(u) and u.meta["val"].dtype == HALF]
        stored = casts[0] if len(casts) == len(node.users) == 1 else node
        name = str(node.target).split(".")[1]
        found.append((name, str(stored.meta["val"].dtype).removeprefix("torch.")))
    return found


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (self.second(x) + x).relu()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def test_a_residual_block() -> None:
    torch.manual_seed(0)
    program = _program(_Block(), torch.randn(2, 3, 6, 5))
    result = CastToFloat16()(program)
    assert _types(result) == [
        ("conv2d", "float32"),  # in registers
        ("relu", "float16"),
        ("conv2d", "float32"),
        ("add", "float32"),
        ("relu", "float16"),
        ("adaptive_avg_pool2d", "float16"),
        ("flatten", "float16"),
        ("linear", "float32"),  # the output
    ]
    kinds = {n: t.dtype for n, t in result.graph_module.state_dict().items()}
    assert {n for n, dtype in kinds.items() if dtype == HALF} == {
        "first.weight",
        "second.weight",
        "head.weight",
    }
    assert {n for n in kinds if n.endswith("bias")} == {n for n, d in kinds.items() if d != HALF}
    assert program.stats().parameters == result.stats().parameters
    # three layers of at most 72 products near 1, each rounded once: 2**-11 for each of four roundings and of two operands
    assert 0 < (result.history[-1].error or 0) < 12 * 2**-11


def test_a_layer_is_rounded_once() -> None:
    """``float16(relu(sum + bias + residual))``, to the bit: float16 products add up in float32 here as there."""
    torch.manual_seed(1)
    x = torch.randn(2, 8, 6, 5)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = (self.conv(x) + x).relu()
            return F.max_pool2d(x, 2)

    model = Layer().eval()
    result = CastToFloat16()(_program(model, x))
    weight, bias = model.conv.weight.half().float(), model.conv.bias
    with torch.no_grad():
        total = F.conv2d(x.half().float(), weight, bias, padding=1) + x
        want = F.max_pool2d(total.relu().half().float(), 2)
        assert torch.equal(result(x), want)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        x = self.block(self.words(words))
        # RMS norm, spelled out
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()  # type: ignore[no-any-return]


def test_a_transformer() -> None:
    torch.manual_seed(2)
    result = CastToFloat16()(_program(_Tokens(), torch.randint(0, 9, (2, 5))))
    types = _types(result)
    for name in ("embedding", "scaled_dot_product_attention", "gelu", "unflatten"):
        assert (name, "float16") in types
    assert [t for n, t in types if n == "layer_norm"] == ["float16", "float16"]
    assert types[-5:] == [
        ("pow", "float32"),
        ("mean", "float32"),
        ("add", "float32"),
        ("rsqrt", "float32"),
        ("mul", "float32"),
    ]
    # values near 1 through some ten roundings of 2**-11
    assert 0 < (result.history[-1].error or 0) < 10 * 2**-11


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda x: x.softmax(-1), Kind.NORM),
        (lambda x: F.layer_norm(x, (4,)), Kind.NORM),
        (lambda x: x.exp(), Kind.FLOAT32),
        (lambda x: x.log(), Kind.FLOAT32),
        (lambda x: x**2, Kind.FLOAT32),
        (lambda x: x.sum(-1), Kind.FLOAT32),
        (lambda x: x.cumsum(-1), Kind.FLOAT32),
        (lambda x: x + -3e38, Kind.FLOAT32),
        (lambda x: x @ x, Kind.PRODUCT),
        (lambda x: x + 1, Kind.FOLLOW),
        (lambda x: x.transpose(0, 1), Kind.MOVE),
        (lambda x: F.pad(x, (1, 1)), Kind.MOVE),
        (lambda x: F.pad(x, (1, 1), value=2.0), Kind.FOLLOW),
        (lambda x: x > 0, Kind.FOLLOW),
        (lambda x: x.argmax(-1), Kind.FOLLOW),
        (lambda x: x.double(), Kind.EXACT),
    ],
)
def test_kinds(call: object, kind: Kind) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)  # type: ignore[operator, no-any-return]

    calls = [n for n in _program(Model(), torch.rand(4, 4)).graph.nodes if n.op == "call_function"]
    assert kind_of(calls[0]) is kind


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    model, x = random_model(seed)
    result = CastToFloat16()(_program(model, x))
    # up to 14 layers of values near 1, a rounding of 2**-11 each
    assert (result.history[-1].error or 0) < 14 * 2**-11
    again = CastToFloat16()(result)
    assert again.history[-1].rewrites == 0
    assert len(again.graph.nodes) == len(result.graph.nodes)


def test_a_layer_whose_result_leaves_is_counted() -> None:
    """Nothing is stored in float16, and yet its operands are rounded: the history has the error."""
    torch.manual_seed(8)
    result = CastToFloat16()(_program(nn.Linear(6, 4), torch.randn(3, 6)))
    record = result.history[-1]
    assert record.rewrites == 2  # the input, the weight
    assert 0 < (record.error or 0) < 6 * 2**-11  # six products near 1 of two rounded operands each
    assert CastToFloat16()(result).history[-1].rewrites == 0


def test_a_cpu_computes_the_same_program() -> None:
    """A rewritten program is ATen: what a GPU was to run is compiled for this machine too."""
    torch.manual_seed(6)
    x = torch.randn(2, 3, 6, 5)
    result = CastToFloat16()(_program(_Block(), x))
    given = go.compile(result, "native", threads=1).session()(x.numpy())
    # float32 sums of 72 products near 1 in another order, which may round two values to float16 the other way
    torch.testing.assert_close(torch.from_numpy(given), result(x), rtol=0, atol=2 * 2.0**-10)


def test_a_range_of_batches() -> None:
    x = torch.randn(2, 3, 6, 5)
    result = CastToFloat16()(_program(_Block(), x, dynamic_batch=(1, 4)))
    assert result(x[:1]).shape == (1, 4)
    # PyTorch adds up another batch in another order
    torch.testing.assert_close(result(x)[:1], result(x[:1]), rtol=0, atol=2 * 2.0**-10)


def test_weights_beyond_float16_stay() -> None:
    model = _Block()
    with torch.no_grad():
        model.head.weight[0, 0] = 70000.0
    result = CastToFloat16()(_program(model, torch.randn(2, 3, 6, 5)))
    reason = "its weights reach 7e+04, and float16 ends at 65504"
    assert kept_in_float32(result) == (("linear", reason),)
    assert result.graph_module.get_parameter("head.weight").dtype == torch.float32


def test_a_mask_beyond_float16_keeps_its_values() -> None:
    """What would be infinite in float16 is not: a row without a token has no NaN."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            scores = torch.matmul(x, x.transpose(1, 2))
            scores = scores.masked_fill(there == 0, torch.finfo(torch.float32).min)
            return torch.matmul(scores.softmax(-1), x)

    x, there = torch.randn(2, 3, 4), torch.ones(2, 1, 3)
    there[0] = 0
    result = CastToFloat16()(_program(Masked(), x, there))
    assert not result(x, there).isnan().any()


def test_a_mask_among_the_parameters_keeps_its_values() -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(3, 3))
            self.mask[1:] = torch.finfo(torch.float32).min

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.matmul(x, x.transpose(1, 2)) + self.mask
            return torch.matmul(scores.softmax(-1), x)

    x = torch.randn(2, 3, 4)
    result = CastToFloat16()(_program(Masked(), x))
    assert ("add", "float32") in _types(result)
    assert not result(x).isnan().any()


def test_a_weight_of_two_layers_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 8)

        def forward(self, words: Tensor) -> Tensor:
            return F.linear(self.words(words), self.words.weight)

    result = CastToFloat16()(_program(Tied(), torch.randint(0, 9, (2, 5))))
    assert [t.dtype for t in result.graph_module.state_dict().values()] == [HALF]


class _Mixed(nn.Module):
    """A quantized layer, a sigmoid in float, and one layer that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x)  # type: ignore[no-any-return]


def _integer(skip: Sequence[str]) -> tuple[go.Program, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 8)
    quantize = go.passes.Quantize(calibration=[(x,)])
    program = quantize(go.capture(_Mixed().eval(), (x,)))
    return integerize(simplified(program), tuple(skip)), x


def test_integers_are_left_alone() -> None:
    program, x = _integer(())
    result = CastToFloat16()(program)
    assert result.history[-1].rewrites == 0
    assert torch.equal(result(x), program(x))


def test_the_float_layer_of_an_integer_network() -> None:
    program, x = _integer(("conv2d_1",))
    result = CastToFloat16()(program)
    calls = [str(n.target) for n in result.graph.nodes if ops.is_op(n, "conv2d")]
    integers = [n for n in result.graph.nodes if "graphopt" in str(n.target)]
    assert len(calls) == 1
    assert [n.target for n in integers] == [
        n.target for n in program.graph.nodes if "graphopt" in str(n.target)
    ]
    assert result.graph_module.state_dict()["second.weight_quantized"].dtype == HALF
    # 72 products of operands with 11 bits each
    torch.testing.assert_close(result(x), program(x), rtol=0, atol=2 * 2**-11 * 3)
