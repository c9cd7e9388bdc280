"""Products of float16 activations as the lowering spells them: which, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.cuda import build
from graphopt.backends.cuda.cast_to_float16 import CastToFloat16
from graphopt.backends.cuda.half_products import spell_half_products

_LIBRARY = torch.library.Library("graphopt", "IMPL")


@pytest.fixture(name="defined", scope="module", autouse=True)
def _defined() -> None:
    """The operator, which only lowered code computes, by its definition."""
    _LIBRARY.impl("half_matmul", lambda a, b: torch.matmul(a.float(), b.float()), "CPU")


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _spelled(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[go.Program, go.Program]:
    program = CastToFloat16()(go.capture(_Call(function), inputs))
    return program, spell_half_products(program)


def _names(program: go.Program) -> list[str]:
    calls = [str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in calls if name != "to"]


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5))])
def test_products(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(shape) for shape in shapes)
    program, spelled = _spelled(torch.matmul, a, b)
    assert _names(program) == ["matmul"]
    assert _names(spelled) == ["half_matmul"]
    assert torch.equal(spelled(a, b), program(a, b))


def _masks() -> dict[str, Tensor | None]:
    seen = torch.rand(2, 1, 5, 7) > 0.4
    seen[0, :, 2] = False  # a row that may see nothing
    return {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -math.inf)}


@pytest.mark.parametrize("name", ["none", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention(name: str, scale: float | None) -> None:
    torch.manual_seed(4)
    mask = _masks()[name]
    query, key, value = (torch.randn(2, 3, size, 8) for size in (5, 7, 7))
    more = [] if mask is None else [mask]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    program, spelled = _spelled(attend, query, key, value, *more)
    assert _names(spelled).count("half_matmul") == 2
    assert "scaled_dot_product_attention" not in _names(spelled)
    # probabilities, which add up to 1, are rounded to 11 bits and multiply values of at most 4
    given = query, key, value, *more
    torch.testing.assert_close(spelled(*given), program(*given), rtol=0, atol=4 * 2.0**-11)


@pytest.mark.parametrize("keys", [5, 7])
def test_causal_attention(keys: int) -> None:
    torch.manual_seed(5)
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, keys, 8)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(query, key, key, is_causal=True)
        return F.scaled_dot_product_attention(y, key, key, is_causal=True)

    program, spelled = _spelled(attend, query, key)
    assert _names(spelled).count("half_matmul") == 4
    assert [n.target for n in spelled.graph.nodes if n.op == "get_attr"] == ["causal_mask"]
    # as above, of two attentions
    torch.testing.assert_close(
        spelled(query, key), program(query, key), rtol=0, atol=2 * 4 * 2.0**-11
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: x.exp() @ x.exp().double().transpose(-1, -2).float(),
        torch.relu,
    ],
)
def test_left_alone(function: Callable[..., Tensor]) -> None:
    program = go.capture(_Call(function), (torch.randn(2, 3, 4),))
    assert spell_half_products(program) is program


def test_kernels_read_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of an operand in float32."""
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    query = torch.randn(2, 3, 5, 8)
    program = go.capture(_Call(lambda x: F.scaled_dot_product_attention(x, x + 1, x)), (query,))
    source = go.compile(program, "sm_80", precision="float16").library.decode("latin-1")
    heads = [line for line in source.splitlines() if "__global__" in line and "matmul" in line]
    assert heads
    assert all(head.count("half* __restrict__") >= 2 for head in heads)
