"""float16 convolution pruned 2:4 on sparse tensor cores, run by the interpreter; see ``test_float_product`` for the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.backends.cpu.workload import Conv2d
from graphopt.backends.cuda.conv_plan import plan_conv
from graphopt.backends.cuda.products import PRODUCTS
from graphopt.backends.cuda.sparse_conv import sparse_conv
from graphopt.backends.cuda.sparse_pack import (
    FRAGMENT_BYTES,
    WEIGHT_BYTES,
    compress,
    pack_sparse_float,
)
from graphopt.backends.cuda.sparse_plan import TILES, SparseTile, plan_sparse, sparse_form
from tests.backends.cuda.harness import AMPERE, Array
from tests.backends.cuda.simt_sparse import expand
from tests.backends.cuda.sparse_harness import prune
from tests.backends.cuda.test_float_product import FloatCase, float_workload

SMALL = SparseTile(32, 32, (2, 2))


class _SparseCase(FloatCase):
    def __init__(self, workload: Conv2d, small: bool = True, tile: SparseTile = SMALL) -> None:
        super().__init__(workload, "f16", small=small)
        self.weight, self.tile = prune(self.weight, self.rng), tile

    def kernel(self) -> tuple[Any, list[Array]]:
        plan = plan_sparse(self.workload, self.arch, self.tile)
        return sparse_conv(plan, self.arch), pack_sparse_float(plan, self.weight, self.bias)


@pytest.mark.parametrize("out", ["float16", "float32"])
@pytest.mark.parametrize("small", [True, False], ids=["integers", "normal"])
def test_with_all_that_follows(out: str, small: bool) -> None:
    workload = float_workload("float16", (20, 37), out=out, residual=True, relu=True)
    case = _SparseCase(workload, small)
    want, bound = case.expected()
    found = case.result().astype(np.float64)
    assert (np.abs(found - want) <= (0 if small else bound)).all()


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def test_every_tile(tile: SparseTile) -> None:
    case = _SparseCase(float_workload("float16", (24, 40)), tile=tile)
    assert (case.result() == case.expected()[0]).all()


@pytest.mark.parametrize(
    "more",
    [
        {"channels": (4, 9), "size": (9, 7), "stride": (2, 2)},
        {"channels": (12, 33), "kernel": (5, 3), "padding": (2, 1)},
        {"channels": (80, 17), "kernel": (1, 1), "padding": (0, 0)},
        {"channels": (12, 8), "dilation": (2, 1), "padding": (2, 1)},
        {"channels": (3, 8), "x_more": {"channel_stride": 4}},
        {"channels": (8, 8), "x_more": {"channel_stride": 24, "first_channel": 8, "shared": True}},
        {"channels": (8, 12), "y_more": {"channel_stride": 32, "first_channel": 4, "shared": True}},
    ],
    ids=["strided", "tall", "point", "dilated", "rgb-in-fours", "slice-in", "slice-out"],
)
def test_shapes(more: dict[str, Any]) -> None:
    case = _SparseCase(float_workload("float16", **more))
    assert (case.result() == case.expected()[0]).all()


def _packed() -> tuple[Array, Array]:
    """A pruned 16 x 32 weight, and its fragment."""
    workload = float_workload("float16", (32, 16), kernel=(1, 1), padding=(0, 0))
    case = _SparseCase(workload)
    return case.weight[:, :, 0, 0], case.kernel()[1][0].view(np.int8)[:FRAGMENT_BYTES]


def test_lanes_hold_what_the_documentation_says() -> None:
    weight, fragment = _packed()
    registers = fragment[:WEIGHT_BYTES].view(np.float16).reshape(1, 32, 4, 2)
    words = fragment[WEIGHT_BYTES:].view("<u4").reshape(1, 32)
    assert (expand(registers, words)[0] == weight).all()


def test_metadata_lie_as_cutlass_orders_them() -> None:
    """A second source, ``host_reorder.h``: halves of 16 columns, rows g, g + 8, g + 16, g + 24 behind each other, then 2 x 2
    blocks transposed; two halves are the word of a lane. Rows from 16 on are another selector's, which is not used.
    """
    weight, fragment = _packed()
    plain = np.zeros((32, 2), np.uint16)
    plain[:16] = compress(weight.astype(np.float16))[1].astype("<u4").view("<u2")
    ordered = np.zeros((32, 2), np.uint16)
    for row in range(32):
        for column in range(2):
            to = [row % 8 * 4 + row // 8, column]
            if to[0] % 2 != to[1] % 2:
                to = [to[0] + (1 if column else -1), 1 - column]
            ordered[to[0], to[1]] = plain[row, column]
    assert (ordered.reshape(-1) == fragment[WEIGHT_BYTES:].view("<u2")).all()


def test_which_layers() -> None:
    """tf32 would want 1:2, and groups of float16 channels that do not come in fours would lie across taps."""
    whole = float_workload("float16", (256, 256), size=(28, 28), batch=32)
    weight = np.zeros((256, 256, 3, 3), np.float32)
    form = sparse_form(plan_conv(whole, AMPERE), weight, AMPERE)
    assert form is not None
    assert form.pays
    odd = float_workload("float16", (254, 256), size=(28, 28), batch=32)
    assert sparse_form(plan_conv(odd, AMPERE), weight[:, :254], AMPERE) is None
    single = float_workload("float32", (256, 256), size=(28, 28), batch=32)
    tf32 = plan_conv(single, AMPERE, product=PRODUCTS["tf32"])
    assert sparse_form(tf32, weight, AMPERE) is None
