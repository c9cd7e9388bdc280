"""float16 and tf32 convolution on tensor cores, run by the interpreter.

Small integers are exact whatever the order of the sum. Of other numbers, products of float16 and of tf32 are exact in
float32, and so is the interpreter's sum of a fragment but for one rounding: at most ``fragments + 3`` roundings of 2**-24 of
the largest partial sum, which the sum of magnitudes bounds; then the output's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.backends.cpu.workload import Activation, Conv2d, Epilogue
from graphopt.backends.cuda.arch import ARCHS
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_pack import pack_float_conv, round_tf32
from graphopt.backends.cuda.conv_plan import Tile, fits, plan_conv
from graphopt.backends.cuda.products import PRODUCTS
from tests.backends.cuda.harness import Array, conv_workload, image, logical, stored, to_torch
from tests.backends.cuda.simt import run

SMALL = Tile(32, 32, (2, 2))


class FloatCase:
    """A float workload with random data; ``small``: integers of which every sum is exact in float16."""

    def __init__(self, workload: Conv2d, product: str, arch: str = "sm_80", small: bool = False):
        rng = np.random.default_rng(7)
        self.workload, self.product, self.arch = workload, PRODUCTS[product], ARCHS[arch]
        self.rng, self.small, self.batch = rng, small, 2
        x, y = workload.x, workload.y
        self.x = self._numbers(self.batch, x.height, x.width, x.channels).astype(x.dtype)
        self.weight = self._numbers(y.channels, x.channels, *workload.kernel)
        self.bias = self._numbers(y.channels)
        self.residual = self._numbers(self.batch, y.height, y.width, y.channels).astype(y.dtype)

    def _numbers(self, *shape: int) -> Array:
        if self.small:
            return self.rng.integers(-2, 3, shape).astype(np.float32)
        return self.rng.standard_normal(shape).astype(np.float32)

    def _sum(self, x: Array, weight: Array, bias: Array, residual: Array) -> torch.Tensor:
        w = self.workload
        parts = to_torch(x.astype(np.float64)), torch.from_numpy(weight.astype(np.float64))
        more = torch.from_numpy(bias.astype(np.float64))
        total = torch.nn.functional.conv2d(*parts, more, w.stride, w.padding, w.dilation)
        if w.residual is not None:
            total = total + to_torch(residual.astype(np.float64))
        return total

    def expected(self) -> tuple[Array, Array]:
        """The result of rounded operands in float64, and a bound on the distance from it."""
        w = self.workload
        x, weight = self.x, self.weight.astype(self.product.weight)
        if self.product.rounds:
            x, weight = round_tf32(x), round_tf32(weight)
        total = self._sum(x, weight, self.bias, self.residual)
        magnitude = self._sum(*(np.abs(part) for part in (x, weight, self.bias, self.residual)))
        if w.epilogue.activation is not None:
            total = total.relu()
        steps = plan_conv(w, self.arch, SMALL, self.product).steps * 2 + 3
        unit = 2.0**-24 if w.y.dtype == "float32" else 2.0**-11
        bound = magnitude * steps * 2.0**-24 + total.abs() * unit
        return total.numpy().transpose(0, 2, 3, 1), bound.numpy().transpose(0, 2, 3, 1)

    def kernel(self) -> tuple[Any, list[Array]]:
        """The kernel and its packed constants."""
        plan = plan_conv(self.workload, self.arch, SMALL, self.product)
        return conv(plan, self.arch), pack_float_conv(plan, self.weight, self.bias)

    def result(self) -> Array:
        w = self.workload
        x = stored(w.x, self.batch, self.x, self.rng)
        mine = slice(w.x.first_channel, w.x.first_channel + w.x.channels)
        beside = np.delete(np.arange(x.shape[-1]), mine)
        x[..., beside] = np.nan  # nothing else of a pixel may take part
        y = np.full((self.batch, *w.y.shape), 77.0, w.y.dtype)
        others = [] if w.residual is None else [stored(w.residual, 2, self.residual, self.rng)]
        function, packed = self.kernel()
        run(function, x, *packed, *others, y, asynchronous=self.arch.async_copy)
        return logical(w.y, y)


def float_workload(
    dtype: str, channels: tuple[int, int], out: str = "", relu: bool = False, **more: Any
) -> Conv2d:
    out = out or dtype
    whole = conv_workload(channels, dtype=dtype, x_zero_point=0, **more)
    epilogue = Epilogue(
        float_residual=whole.residual is not None, activation=Activation("relu") if relu else None
    )
    y = replace(whole.y, dtype=out)
    residual = None if whole.residual is None else replace(whole.residual, dtype=out)
    return replace(whole, y=y, residual=residual, epilogue=epilogue)


CASES = [
    pytest.param("f16", "sm_80", {}, id="f16"),
    pytest.param("f16", "sm_75", {}, id="f16-turing"),
    pytest.param("tf32", "sm_80", {}, id="tf32"),
    pytest.param("f16", "sm_80", {"out": "float32"}, id="f16-to-float32"),
]


@pytest.mark.parametrize(("product", "arch", "more"), CASES)
@pytest.mark.parametrize("small", [True, False], ids=["integers", "normal"])
def test_with_all_that_follows(product: str, arch: str, more: dict[str, Any], small: bool) -> None:
    workload = float_workload(PRODUCTS[product].x, (20, 37), residual=True, relu=True, **more)
    case = FloatCase(workload, product, arch, small)
    want, bound = case.expected()
    found = case.result().astype(np.float64)
    assert (np.abs(found - want) <= (0 if small else bound)).all()


@pytest.mark.parametrize("product", ["f16", "tf32"])
@pytest.mark.parametrize(
    "more",
    [
        {"channels": (3, 9), "size": (9, 7), "stride": (2, 2)},
        {"channels": (1, 33), "kernel": (5, 3), "padding": (2, 1)},
        {"channels": (80, 17), "kernel": (1, 1), "padding": (0, 0)},
        {"channels": (12, 8), "dilation": (2, 1), "padding": (2, 1)},
        {"channels": (3, 8), "x_more": {"channel_stride": 4}},
        {"channels": (9, 8), "x_more": {"channel_stride": 24, "first_channel": 8, "shared": True}},
        {"channels": (8, 12), "y_more": {"channel_stride": 32, "first_channel": 4, "shared": True}},
    ],
    ids=["rgb", "grey", "point", "dilated", "rgb-in-fours", "odd-slice-in", "slice-out"],
)
def test_shapes(product: str, more: dict[str, Any]) -> None:
    case = FloatCase(float_workload(PRODUCTS[product].x, **more), product, small=True)
    want, _ = case.expected()
    assert (case.result() == want).all()


def test_odd_float16_channels_are_copied_without_cp_async_on_turing_too() -> None:
    case = FloatCase(float_workload("float16", (3, 9)), "f16", "sm_75", small=True)
    assert (case.result() == case.expected()[0]).all()


def test_what_tf32_keeps() -> None:
    """10 bits of fraction, ties away from zero (PTX ISA, ``cvt.rna``)."""
    ulp = 2.0**-10
    values = np.array([1 + ulp / 2, 1 + ulp / 2 - 2**-23, -1 - ulp / 2, 2 - ulp / 2], np.float32)
    assert round_tf32(values).tolist() == [1 + ulp, 1, -1 - ulp, 2]
    special = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    assert np.array_equal(round_tf32(special), special, equal_nan=True)


def test_what_is_no_matrix_product() -> None:
    half = float_workload("float16", (8, 8))
    assert fits(half)
    assert not fits(replace(half, groups=2))
    single = float_workload("float32", (8, 8))
    assert not fits(single), "tf32 drops bits: it must be asked for"
    assert fits(single, PRODUCTS["tf32"])
    assert not fits(half, PRODUCTS["tf32"])
    assert not fits(replace(half, residual=image(2, (5, 6), 8, "float32")))
    assert "tf32" not in ARCHS["sm_75"].products
