"""Steps that take the casts around them into their kernels, and those that do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.cuda.autocast import is_cast
from graphopt.backends.cuda.cast_to_float16 import CastToFloat16
from graphopt.backends.cuda.lower import SELECTORS
from graphopt.backends.lower.plan import Plan, make_plan
from graphopt.backends.lower.step import dtype_of
from graphopt.preparation import simplified


class _Model(nn.Module):
    def __init__(self, function: Callable[[_Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _plan(function: Callable[[_Model, Tensor], Tensor]) -> Plan:
    torch.manual_seed(0)
    program = go.capture(_Model(function).eval(), (torch.randn(2, 4, 5, 6),))
    return make_plan(CastToFloat16()(simplified(program)), SELECTORS, margins=False)


def _steps(plan: Plan) -> list[tuple[str, list[str], str]]:
    """The first operator of every step, the types that it reads, and the one that it makes."""
    return [
        (
            str(step.nodes[0].target).split(".")[1],
            [dtype_of(value) for value in step.inputs],
            dtype_of(step.output),
        )
        for step in plan.steps.values()
    ]


HALF, SINGLE = "float16", "float32"
_INPUT = ("to", [SINGLE], HALF)


def test_a_residual_block() -> None:
    plan = _plan(lambda m, x: m.b((m.b(m.a(x).relu()) + m.a(x)).relu()))
    assert _steps(plan) == [
        _INPUT,
        ("conv2d", [HALF], HALF),
        ("conv2d", [HALF], HALF),
        ("conv2d", [HALF, HALF], HALF),
        ("conv2d", [HALF], SINGLE),
    ]
    cast = [node for node in plan.program.graph.nodes if is_cast(node)]
    assert sum(node in plan.live for node in cast) < len(cast)  # most are in no kernel's way


def test_a_padding_is_the_windows() -> None:
    plan = _plan(lambda m, x: m.b(m.a(F.pad(m.a(x), (1, 2, 0, 1)))))
    step = list(plan.steps.values())[2]
    assert step.window.padding == (0, 1)  # type: ignore[attr-defined]
    assert [s[1:] for s in _steps(plan)[1:]] == [([HALF], HALF), ([HALF], HALF), ([HALF], SINGLE)]


def test_a_residual_has_the_type_of_the_result() -> None:
    """The last sum leaves the network in float32: its residual is widened before."""
    plan = _plan(lambda m, x: m.b(m.a(x)) + F.max_pool2d(m.a(x), 1))
    assert _steps(plan)[-1] == ("conv2d", [HALF, SINGLE], SINGLE)


def test_a_norm_and_its_activation() -> None:
    plan = _plan(lambda m, x: m.b(m.norm(F.max_pool2d(m.a(x), 2)).relu()))
    assert ("batch_norm", [HALF], HALF) in _steps(plan)
    assert all(name != "relu" for name, *_ in _steps(plan))


def test_a_concatenation_is_of_one_type() -> None:
    alike = _plan(lambda m, x: m.a(torch.cat([m.a(x), m.b(x)], 1)[:, 2:6]))
    assert ("cat", [HALF, HALF], HALF) in _steps(alike)
    assert alike.in_place
    mixed = _plan(lambda m, x: torch.cat([m.a(x), m.b(x).exp()], 1) * 2.0)
    assert ("cat", [SINGLE, SINGLE], SINGLE) in _steps(mixed)


def test_float32_programs_are_left_alone() -> None:
    program = go.capture(_Model(lambda m, x: m.b(m.a(x)) + x).eval(), (torch.randn(2, 4, 5, 6),))
    plan = make_plan(program, SELECTORS, margins=False)
    assert {t for _, given, made in _steps(plan) for t in (*given, made)} == {SINGLE}
