"""Attention, its parts and its variants, compiled: every one a kernel of ours where it says so, and equal to float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.lower.plan import make_plan
from graphopt.backends.lower.views import view_of, written_view
from tests.end_to_end.support import RUNNABLE, compiled, quantized, reference, run

CAUSAL = torch.ones(6, 6).tril().bool()


def kernels(artifact) -> list[str]:
    """Operators that have kernels of ours, in order."""
    return [row.operator.split(".")[1] for row in artifact.manifest.kernels]


def check(
    model: nn.Module, *inputs: Tensor, target: str = RUNNABLE[0], threads: int = 1, dynamic=None
):
    """Compile, compare with float64 eager within 1e-5 of the largest output (float32 rounding), return the kernels."""
    model = model.eval()
    artifact = compiled(go.capture(model, inputs, dynamic_batch=dynamic), target, threads)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = double(*(x.double() if x.is_floating_point() else x for x in inputs)).numpy()
    (actual,) = run(artifact, inputs)
    assert actual.shape == exact.shape
    assert np.isnan(actual).tolist() == np.isnan(exact).tolist()
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.nanmax(np.abs(exact)))
    return kernels(artifact)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class SelfAttention(nn.Module):
    """Heads from one linear layer (``fused``: as timm splits them) or three, back by another."""

    def __init__(self, fused: bool, width: int = 12, heads: int = 3, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.fused, self.options = heads, fused, options
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x)
        if self.fused:
            parts = qkv.reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = [p.view(n, t, self.heads, -1).transpose(1, 2) for p in qkv.chunk(3, -1)]
        y = F.scaled_dot_product_attention(*parts, **self.options)
        made: Tensor = self.out(y.transpose(1, 2).reshape(n, t, c))
        return x + made


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self.function(*inputs)
        return made


@pytest.mark.parametrize("target", RUNNABLE)
def test_self_attention_in_three_kernels(target):
    """Heads are split and joined by strides, the residual sum is the last layer's."""
    used = check(SelfAttention(fused=True), noise(2, 5, 12), target=target)
    assert used == ["linear", "scaled_dot_product_attention", "linear"]


def test_a_dynamic_batch_and_threads():
    model = SelfAttention(fused=False, is_causal=True)
    used = check(model, noise(3, 7, 12), threads=2, dynamic=(1, 8))
    assert used == ["linear", "scaled_dot_product_attention", "linear"]


def test_int8():
    """One quantum may differ where float rounding tips a quantize; the sum is the last layer's."""
    model, x = SelfAttention(fused=True).eval(), noise(2, 5, 12)
    artifact = compiled(quantized(model, (x,)))
    (actual,), (want,) = run(artifact, (x,)), reference(artifact.program, (x,))
    assert np.median(np.abs(actual - want)) <= 1e-6 * np.abs(want).max()
    assert np.abs(actual - want).max() <= 0.02 * np.abs(want).max()
    linear = ["quantize", "linear_dequantize"]
    assert kernels(artifact) == [*linear, "scaled_dot_product_attention", *linear]


MASKS = {
    "boolean": CAUSAL,
    "float": noise(3, 6, 6, seed=1),
    "keys": noise(1, 1, 1, 6, seed=2),
    "nothing for one row": CAUSAL & (torch.arange(6) != 0),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", MASKS[mask])

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    used = check(Masked(), *(noise(2, 3, 6, 8, seed=seed) for seed in range(3)))
    assert used == ["scaled_dot_product_attention"]


def test_a_mask_that_is_an_input():
    def masked(x: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=keep[:, None, None, :], scale=0.2)

    keep = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    assert check(Calls(masked), noise(2, 3, 5, 8), keep) == ["scaled_dot_product_attention"]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_attention_by_hand():
    """The scale joins the first product, the order of heads the second."""
    used = check(Calls(by_hand), *(noise(2, 3, 29, 8, seed=seed) for seed in range(3)))
    assert used == ["matmul", "softmax", "matmul"]


PRODUCTS = {
    "mm": (lambda a, b: a @ b, (3, 5), (5, 7)),
    "bmm": (torch.bmm, (2, 3, 1), (2, 1, 7)),
    "one matrix for all": (lambda a, b: a @ b, (2, 4, 5), (5, 3)),
    "heads alike": (lambda a, b: a @ b, (2, 4, 3, 5), (1, 1, 5, 2)),
    "five axes": (lambda a, b: 2 * (a @ b), (2, 3, 2, 4, 5), (2, 3, 2, 5, 6)),
    "left transposed": (lambda a, b: a.mT @ b, (2, 5, 3), (2, 5, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    function, *shapes = PRODUCTS[name]
    used = check(Calls(function), *(noise(*shape, seed=len(shape)) for shape in shapes))
    assert used[0] in ("matmul", "bmm", "mm")


def test_softmax_of_a_masked_row_is_nan():
    x = noise(2, 4, 9)
    x[1, 2] = -torch.inf
    assert check(Calls(lambda x: x.softmax(-1)), x) == ["softmax"]


TOKENS = {
    "layer_norm": nn.LayerNorm(12),
    "layer_norm without bias": nn.LayerNorm(12, elementwise_affine=False),
    "sum and gelu": Calls(lambda x: F.gelu(x + x.tanh())),
    "product": Calls(lambda x: x * x.sigmoid()),
    "mean": Calls(lambda x: x.mean(1)),
    "mean kept": Calls(lambda x: x.mean(-2, keepdim=True)),
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("dynamic", [None, (1, 4)])
def test_tokens(name, dynamic):
    assert check(TOKENS[name], noise(2, 5, 12), dynamic=dynamic)


def grouped(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, 3)).transpose(1, 2)
    few = heads[:, :2]
    return F.scaled_dot_product_attention(heads, few, few, enable_gqa=True)


LEFT = {
    "softmax over channels": Calls(lambda x: x.softmax(1)),
    "layer norm of two axes": nn.LayerNorm([5, 12]),
    "dropout": Calls(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
    "grouped queries": Calls(grouped),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_relax(name):
    program = go.capture(LEFT[name].eval(), (noise(2, 5, 12),))
    assert not make_plan(program).steps


def test_a_wrong_mask_shows():
    """What the comparison is worth: one masked key more fails it."""
    x, right, wrong = noise(1, 1, 6, 4), CAUSAL.clone(), CAUSAL.clone()
    wrong[5, 0] = False
    program = go.capture(
        Calls(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=wrong)), (x,)
    )
    (actual,) = run(compiled(program), (x,))
    exact = F.scaled_dot_product_attention(x, x, x, attn_mask=right).numpy()
    assert np.abs(actual - exact).max() > 1e-3


def test_views_are_strides():
    program = go.capture(
        Calls(lambda x: x.view(2, 5, 3, 4).permute(0, 2, 1, 3)[:, 1:].softmax(-1)),
        (noise(2, 5, 12),),
    )
    node = next(n for n in program.graph.nodes if go.ops.is_op(n, "softmax"))
    view = view_of(node.all_input_nodes[0])
    assert (view.base.op, view.strides, view.offset) == ("placeholder", (60, 4, 12, 1), 4)
    assert written_view(node) == ([], (40, 20, 4, 1))


def test_a_view_begins_before_a_reshape_that_would_copy():
    program = go.capture(
        Calls(lambda x: x.transpose(1, 2).reshape(2, 60).view(2, 6, 10).softmax(-1)),
        (noise(2, 5, 12),),
    )
    node = next(n for n in program.graph.nodes if go.ops.is_op(n, "softmax"))
    view = view_of(node.all_input_nodes[0])
    assert go.ops.is_op(view.base, "transpose")
    assert view.strides == (60, 10, 1)
