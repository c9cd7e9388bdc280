"""Convolutions whose steps several blocks share: sums of parts, and the kernel that finishes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_pack import pack_conv, pack_float_conv
from graphopt.backends.cuda.conv_plan import ConvPlan, Tile, cycles, plan_conv, split_steps
from graphopt.backends.cuda.conv_sums import finish_sums
from tests.backends.cuda.harness import AMPERE, Array, ConvCase, conv_workload, logical, stored
from tests.backends.cuda.simt import run
from tests.backends.cuda.test_float_product import FloatCase, float_workload

SMALL = Tile(32, 32, (2, 2))


def _run(plan: ConvPlan, packed: list[Array], x: Array, others: list[Array], batch: int) -> Array:
    y = plan.workload.y
    sums = np.full((batch, *plan.sums_shape), -77, plan.product.sums)
    run(conv(plan, AMPERE), x, packed[0], sums)
    result = np.full((batch, *y.shape), 90, y.dtype)
    run(finish_sums(plan), sums, *packed[1:], *others, result)
    return logical(y, result)


@pytest.mark.parametrize(
    ("splits", "more"),
    [
        (2, {}),
        (3, {"residual": True}),
        (4, {"floats": True}),
        (2, {"dtype": "int8", "x_zero_point": -7, "residual": True}),
        (3, {"batch": None, "y_more": {"channel_stride": 80, "first_channel": 8, "shared": True}}),
    ],
    ids=["two", "residual", "to-floats", "signed", "dynamic-slice-out"],
)
def test_bytes(splits: int, more: dict[str, Any]) -> None:
    """Depth 9 * 68: ten steps of 64, which three and four parts do not divide."""
    case = ConvCase(conv_workload((68, 37), **more))
    w = case.workload
    plan = replace(plan_conv(w, AMPERE, SMALL), splits=splits)
    assert plan.steps % splits == 0
    packed = pack_conv(plan, case.weight, case.bias, case.multiplier)
    x = stored(w.x, case.batch, case.x, case.rng)
    residual = w.residual
    others = [] if residual is None else [stored(residual, case.batch, case.residual, case.rng)]
    assert (_run(plan, packed, x, others, case.batch) == case.expected()).all()


@pytest.mark.parametrize("product", ["f16", "tf32"])
@pytest.mark.parametrize("small", [True, False], ids=["integers", "normal"])
def test_floats(product: str, small: bool) -> None:
    dtype = {"f16": "float16", "tf32": "float32"}[product]
    workload = float_workload(dtype, (40, 37), residual=True, relu=True)
    case = FloatCase(workload, product, small=small)
    plan = replace(plan_conv(workload, AMPERE, SMALL, case.product), splits=3)
    packed = pack_float_conv(plan, case.weight, case.bias)
    found = _run(plan, packed, case.x, [case.residual], case.batch)
    want, bound = case.expected()
    assert (np.abs(found.astype(np.float64) - want) <= (0 if small else bound)).all()


def _choice(workload: Conv2d, arch: str = "sm_80") -> ConvPlan:
    return split_steps(plan_conv(workload, ARCHS[arch]), ARCHS[arch])


def test_a_deep_layer_of_few_outputs_is_split() -> None:
    workload = conv_workload((512, 512), size=(7, 7), batch=1)
    plan, whole = _choice(workload), plan_conv(workload, AMPERE)
    assert plan.splits > 1
    assert cycles(plan, AMPERE) < cycles(whole, AMPERE)
    assert pack_conv(plan, *_arrays(workload))[0].size == plan.steps * 64 * plan.padded_channels


def _arrays(workload: Conv2d) -> tuple[Array, Array, Array]:
    case = ConvCase(workload, batch=1)
    return case.weight, case.bias, case.multiplier


@pytest.mark.parametrize(
    "workload",
    [
        conv_workload((512, 512), size=(7, 7), batch=None),
        conv_workload((128, 512), size=(7, 7), kernel=(1, 1), padding=(0, 0), batch=1),
        conv_workload((256, 256), size=(28, 28), batch=32),
    ],
    ids=["any batch", "not deep", "many outputs"],
)
def test_others_are_not(workload: Conv2d) -> None:
    assert _choice(workload).splits == 1
