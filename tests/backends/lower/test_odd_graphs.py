"""Graphs of unusual shape: compiled code against eager in float, and bit for bit against the integer program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphopt as go
from tests.end_to_end.support import assert_bit_equal, compiled, float_islands, quantized, run

CHANNELS = 6
Forward = Callable[["Odd", Tensor], Any]


class Odd(nn.Module):
    """Three layers and a forward that a test gives."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.b = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.wide = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.single = nn.Conv2d(CHANNELS, 1, 1)
        self.head = nn.Linear(CHANNELS, 5)
        self.dropout = nn.Dropout()
        self.register_buffer("constant", torch.arange(4.0))
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _dictionary(m: Odd, x: Tensor) -> Any:
    y = m.a(x)
    return {"maps": [y, (F.relu(y), x)], "mean": y.mean((2, 3))}


def _twice(m: Odd, x: Tensor) -> Any:
    y = m.a(x)
    return y, y


def _output_used_inside(m: Odd, x: Tensor) -> Any:
    y = F.relu(m.a(x))
    return y, m.b(y)


def _two_activations(m: Odd, x: Tensor) -> Any:
    y = m.a(x)
    return torch.cat([F.relu(y), torch.sigmoid(y)], 1)


def _pad_for_two(m: Odd, x: Tensor) -> Any:
    padded = F.pad(F.relu(m.a(x)), (1, 2, 0, 1))
    return m.wide(padded), padded * 2


def _asymmetric_pads(m: Odd, x: Tensor) -> Any:
    return m.wide(F.pad(F.pad(F.relu(m.a(x)), (1, 0, 0, 1)), (0, 1, 1, 0)))


def _pad_shared_by_margins(m: Odd, x: Tensor) -> Any:
    y = F.relu(m.a(x))
    return m.wide(F.pad(y, (1, 0, 1, 0))) + m.wide(F.pad(y, (0, 1, 0, 1)))


def _shuffle(m: Odd, x: Tensor) -> Any:
    left, right = m.a(x).chunk(2, 1)
    return m.b(F.channel_shuffle(torch.cat([right, left], 1), 2))


def _unequal_split(m: Odd, x: Tensor) -> Any:
    first, second = m.a(x).split([1, CHANNELS - 1], 1)
    return m.b(torch.cat([F.relu(second), first], 1))


def _gate(m: Odd, x: Tensor) -> Any:
    y = m.a(x)
    return y * torch.sigmoid(m.b(F.adaptive_avg_pool2d(y, 1)))


def _pool_twice(m: Odd, x: Tensor) -> Any:
    y = F.relu(m.a(x))
    return F.max_pool2d(y, 3, 2, 1) + F.avg_pool2d(y, 3, 2, 1)


def _negative_max_pool(m: Odd, x: Tensor) -> Any:
    return F.max_pool2d(m.a(x) - 5.0, 3, 2, 1)


def _last_row(m: Odd, x: Tensor) -> Any:
    return m.head(F.relu(m.a(x))[:, :, -1, -1])


GRAPHS: dict[str, Forward] = {
    "the same value twice": _twice,
    "the input as it is": lambda m, x: (x, m.a(x)),
    "only the input": lambda m, x: x,
    "a constant": lambda m, x: (m.constant, m.a(x)),
    "a dictionary": _dictionary,
    "an output used inside": _output_used_inside,
    "a convolution twice": lambda m, x: m.a(F.relu(m.a(x))),
    "two activations": _two_activations,
    "a value plus itself": lambda m, x: F.relu(m.a(x)) + F.relu(m.a(x)),
    "one value added to itself": lambda m, x: (lambda y: m.b(y + y))(m.a(x)),
    "one value times itself": lambda m, x: (lambda y: m.b(y * y))(m.a(x)),
    "two convolutions added": lambda m, x: F.relu(m.a(x) + m.b(x)),
    "residual of the input": lambda m, x: m.b(F.relu(m.a(x) + x)),
    "depthwise residual": lambda m, x: (lambda y: y + m.depthwise(y))(m.a(x)),
    "twice the addend": lambda m, x: torch.add(m.b(x), m.a(x), alpha=2.0),
    "a pad for two readers": _pad_for_two,
    "a chain of pads": _asymmetric_pads,
    "unequal pads of one value": _pad_shared_by_margins,
    "negative pad": lambda m, x: m.b(F.pad(m.a(x), (-1, 1, 2, -1))),
    "pad by a number": lambda m, x: m.wide(F.pad(m.a(x), (1, 1, 1, 1), value=0.5)),
    "one channel": lambda m, x: m.b(F.relu(m.single(x)).expand(-1, CHANNELS, -1, -1)),
    "one pixel": lambda m, x: m.head(F.relu(m.b(F.adaptive_avg_pool2d(m.a(x), 1))).flatten(1)),
    "one pixel, padded": lambda m, x: m.a(F.adaptive_avg_pool2d(m.a(x), 1)),
    "flatten by reshape": lambda m, x: m.head(m.a(x).mean((2, 3)).reshape(x.shape[0], -1)),
    "mean that keeps": lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True)).squeeze(),
    "channels last linear": lambda m, x: m.head(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "tokens": lambda m, x: m.head(m.a(x).flatten(2).transpose(1, 2)).mean(1),
    "channel shuffle": _shuffle,
    "unequal split": _unequal_split,
    "gate": _gate,
    "two pools of one map": _pool_twice,
    "maximum of negatives": _negative_max_pool,
    "the last pixel": _last_row,
    "dropout": lambda m, x: m.dropout(F.relu(m.dropout(m.a(x)))),
    "resize between": lambda m, x: m.b(F.interpolate(F.relu(m.a(x)), size=(9, 4))),
    "odd adaptive pool": lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), (3, 2))),
    "no layer": lambda m, x: x.flatten(1).sum(1),
    "scalar output": lambda m, x: m.a(x).abs().max(),
}


def _every(step: int) -> list[Any]:
    """All graphs; the quick suite takes one in ``step``."""
    return [
        pytest.param(name, marks=[] if index % step == 0 else [pytest.mark.slow])
        for index, name in enumerate(GRAPHS)
    ]


def _image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _close(got: Any, want: Any) -> None:
    """Same nesting, dtypes and shapes; 1e-5 of the largest element for float32 sums in another order."""
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for ours, eager in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        expected = eager.detach().numpy()
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        allowed = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", _every(2))
def test_float(name: str) -> None:
    model, x = Odd(GRAPHS[name]).eval(), _image(3, CHANNELS, 7, 7)
    session = compiled(go.capture(model, (x,))).session()
    _close(session(x.numpy()), model(x))


@pytest.mark.parametrize("name", _every(3))
def test_integer(name: str) -> None:
    """Bit for bit; where float islands stand inside, up to their rounding, which may tip a later quantize."""
    model, x = Odd(GRAPHS[name]).eval(), _image(2, CHANNELS, 7, 7)
    artifact = compiled(quantized(model, (x,)))
    with torch.no_grad():
        want = [v.numpy() for v in pytree.tree_leaves(artifact.program(x))]
    got = run(artifact, (x,))
    if not float_islands(artifact.program):
        assert_bit_equal(got, want)
        return
    for ours, defined in zip(got, want, strict=True):
        scale = max(1e-3, float(np.abs(defined).max()))
        assert (ours.dtype, ours.shape) == (defined.dtype, defined.shape)
        assert np.median(np.abs(ours - defined)) <= 1e-5 * scale
        assert np.abs(ours - defined).max() <= 0.1 * scale


@pytest.mark.parametrize("name", ["two convolutions added", "gate", "tokens", "channel shuffle"])
def test_any_batch(name: str) -> None:
    """Compiled once for 1 to 8 images."""
    model = Odd(GRAPHS[name]).eval()
    program = go.capture(model, (_image(2, CHANNELS, 5, 5),), dynamic_batch=(1, 8))
    session = compiled(program).session()
    for batch in (1, 3, 8):
        x = _image(batch, CHANNELS, 5, 5)
        _close(session(x.numpy()), model(x))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
@pytest.mark.parametrize("name", ["two convolutions added", "one pixel"])
def test_integer_of_any_size(name: str, scale: float) -> None:
    model, x = Odd(GRAPHS[name]).eval(), _image(2, CHANNELS, 7, 7) * scale
    artifact = compiled(quantized(model, (x,)))
    with torch.no_grad():
        want = [v.numpy() for v in pytree.tree_leaves(artifact.program(x))]
    assert_bit_equal(run(artifact, (x,)), want)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_integer_of_nothing(constant: float) -> None:
    """Weights all zero, and an input that is constant."""
    model = Odd(GRAPHS["two convolutions added"]).eval()
    nn.init.zeros_(model.a.weight)
    x = torch.full((1, CHANNELS, 5, 5), constant)
    artifact = compiled(go.passes.Quantize(calibration=[(x,)])(go.capture(model, (x,))))
    with torch.no_grad():
        want = [artifact.program(x).numpy()]
    assert_bit_equal(run(artifact, (x,)), want)
