from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from tests.models import MODELS, example
from tests.passes.helpers import captured, network, operators, reasons, rewrites

X = example(2, 4, 6, 6)
aten = torch.ops.aten

IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "add-0": lambda x: x + 0,
    "0-add": lambda x: aten.add.Tensor(x, 0.0),
    "sub-0": lambda x: x - 0,
    "mul-1": lambda x: x * 1,
    "div-1": lambda x: x / 1.0,
    "pow-1": lambda x: x**1,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout-of-nothing": lambda x: F.dropout(x, 0.0, training=True),
    "alias": lambda x: aten.alias.default(x),
    "detach": lambda x: x.detach(),
    "to": lambda x: aten.to.dtype(x, torch.float32),
    "reshape": lambda x: x.reshape(2, 4, 6, 6),
    "view": lambda x: x.view(2, -1, 6, 6),
    "flatten": lambda x: torch.flatten(x, 3),
    "squeeze": lambda x: x.squeeze(1),
    "expand": lambda x: x.expand(-1, 4, 6, -1),
    "slice": lambda x: x[:, :, 0:6],
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "permute": lambda x: x.permute(0, 1, 2, 3),
    "permute-pair": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transpose-pair": lambda x: x.transpose(1, -1).transpose(3, 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0)),
    "max-pool": lambda x: F.max_pool2d(x, 1, 1),
    "avg-pool": lambda x: F.avg_pool2d(x, 1, 1),
    "adaptive-pool": lambda x: F.adaptive_avg_pool2d(x, 6),
    "upsample": lambda x: F.interpolate(x, scale_factor=1.0, mode="nearest"),
    "pixel-shuffle": lambda x: F.pixel_shuffle(x, 1),
    "concat": lambda x: torch.cat([x], 1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_is_removed(name: str) -> None:
    identity = IDENTITIES[name]
    program = captured(lambda x: torch.tanh(identity(torch.sin(x))), X)
    result = go.passes.RemoveIdentities()(program)
    assert operators(result) == ["aten.sin.default", "tanh"]
    assert result.history[-1].error in (
        0.0,
        None,
    )  # None: a program with training dropout is not measured
    assert rewrites(go.passes.RemoveIdentities()(result)) == 0


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: F.relu(F.relu(x)), ["relu"]),
        (lambda x: F.relu(torch.sigmoid(x)), ["sigmoid"]),
        (lambda x: F.relu6(F.relu6(x)), ["relu6"]),
        (lambda x: F.relu(F.relu6(x)), ["relu6"]),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 1, 3, 2), ["permute"]),
    ],
    ids=["relu-relu", "relu-sigmoid", "relu6-relu6", "relu-relu6", "permutes-merge"],
)
def test_repeated_operator_becomes_one(
    function: Callable[[Tensor], Tensor], left: list[str]
) -> None:
    assert operators(go.passes.RemoveIdentities()(captured(function, X))) == left


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "add-1": lambda x: x + 1,
    "add-broadcast": lambda x: x[:, :1] + torch.zeros(1, 4, 1, 1),
    "mul-of-int": lambda x: x.to(torch.int32) * 1.0,
    "cast": lambda x: x.to(torch.float64),
    "relu6-of-relu": lambda x: F.relu6(F.relu(x)),
    "relu-of-tanh": lambda x: F.relu(torch.tanh(x)),
    "square-transpose": lambda x: x.transpose(2, 3),
    "shift-by-pad": lambda x: F.pad(x, (1, -1)),
    "reshape": lambda x: x.reshape(2, 24, 6),
    "flip": lambda x: x.flip(2),
    "concat": lambda x: torch.cat([x, x], 1),
    "divisor": lambda x: F.avg_pool2d(x, 1, 1, divisor_override=2),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "max-pool-window": lambda x: F.max_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_a_value_is_kept(name: str) -> None:
    program = captured(KEPT[name], X)
    result = go.passes.RemoveIdentities()(program)
    assert operators(result) == operators(program)
    assert rewrites(result) == 0


def test_dropout_in_training_mode_declines() -> None:
    result = go.passes.RemoveIdentities()(captured(lambda x: F.dropout(x, 0.5, True), X))
    assert operators(result) == ["dropout"]
    assert reasons(result) == ["dropout is in training mode; call program.eval() first"]


def test_layout_copies_go_on_request() -> None:
    program = captured(lambda x: x.permute(0, 2, 3, 1).contiguous().view(2, 36, 4), X)
    assert operators(go.passes.RemoveIdentities()(program)) == ["permute", "contiguous", "reshape"]
    result = go.passes.RemoveIdentities(layout=True)(program)
    assert operators(result) == ["permute", "reshape"]
    assert result.history[-1].contract == "within(1e-05)"


def test_dynamic_batch() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 4, 6, 6).flatten(1).view(-1, 4, 6, 6)[:] + 0

    program = go.capture(Model(), (X,), dynamic_batch=(1, 8))
    result = go.passes.RemoveIdentities()(program)
    assert "add" not in operators(result)
    x = example(5, 4, 6, 6)
    assert torch.equal(result(x), x)


def test_second_run_rewrites_nothing() -> None:
    for name in MODELS:
        once = go.passes.RemoveIdentities()(network(name))
        assert "dropout" not in operators(once)
        assert rewrites(go.passes.RemoveIdentities()(once)) == 0
