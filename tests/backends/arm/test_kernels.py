"""Every family of kernels on every ARM row, emulated: the tests of ``tests/backends/cpu`` that take a row, with those rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from graphopt.backends.arm.isa import DOTPROD, I8MM, ISAS, NEON
from graphopt.backends.cpu.isa import Isa
from tests.backends.arm.machine import PROCESSORS, needs_qemu
from tests.backends.cpu import (
    test_activation,
    test_attention,
    test_concat,
    test_conv,
    test_convert,
    test_depthwise,
    test_layer_norm,
    test_matmul,
    test_planar,
    test_pointwise,
    test_pool,
    test_softmax,
    test_sparse,
    test_winograd,
)

pytestmark = needs_qemu

ROWS = {row.name: row for row in (NEON, DOTPROD, I8MM)}
MODULES = (
    test_activation,
    test_attention,
    test_concat,
    test_conv,
    test_convert,
    test_depthwise,
    test_layer_norm,
    test_matmul,
    test_planar,
    test_pointwise,
    test_pool,
    test_softmax,
    test_sparse,
    test_winograd,
)


def _cases(module: ModuleType) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    """The tests of a module that are parametrized by ``row``: a label, the function, its other arguments."""
    for name, function in vars(module).items():
        marks = [m for m in getattr(function, "pytestmark", ()) if m.name == "parametrize"]
        names = [mark.args[0] for mark in marks]
        if not name.startswith("test_") or "row" not in names:
            continue
        axes = [
            [_named(mark.args[0], value) for value in mark.args[1]]
            for mark in marks
            if mark.args[0] != "row"
        ]
        for values in itertools.product(*axes):
            arguments = {key: value for part in values for key, value in part.items()}
            label = " ".join(str(value) for value in arguments.values())
            family = module.__name__.rpartition(".test_")[2]
            yield f"{family}: {name.removeprefix('test_')} {label}".strip(), function, arguments


def _named(names: str | tuple[str, ...], value: Any) -> dict[str, Any]:
    return {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))


CASES = {
    label: (function, arguments)
    for module in MODULES
    for label, function, arguments in _cases(module)
}

# One or two of each family: odd channels, a 7 x 7 first layer, groups, residuals, ties, the largest sums there are.
QUICK = (
    "attention: shapes (1, 2, 29, 5, 47, 24)",
    "concat: copies_and_requantizes",
    "conv: equals_the_definition first layer",
    "conv: equals_the_definition residual, partial lanes, margins",
    "conv: equals_the_definition groups of 5 to 17",
    "conv: equals_the_definition linear over 37 tokens",
    "conv: equals_the_definition dequantized",
    "conv: nothing_saturates 127",
    "conv: nothing_saturates -128",
    "conv: ties_round_to_even",
    "conv: results_far_outside_int32_are_clamped",
    "conv: float_agrees_with_float64 residual",
    "convert: quantizes_nchw_into_margins 3 4",
    "convert: quantizing_sends_nan_and_infinity_to_the_bounds",
    "depthwise: shapes_of_real_networks 24 3 1 uint8",
    "depthwise: shapes_of_real_networks 40 5 2 uint8",
    "depthwise: shapes_of_real_networks 3 3 2 uint8",
    "matmul: products (1, 2, 29, 5, 47) plain",
    "planar: there_and_back margins, batch of 2",
    "pool: three_by_three_stride_two uint8 max",
    "pool: global_average uint8",
    "softmax: rows 197",
    "sparse: integers_equal_the_definition 3x3 with a residual",
    "winograd: equals_the_definition residual",
)


def _check(row: Isa, label: str) -> None:
    function, arguments = CASES[label]
    function(row=row, **arguments)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("label", QUICK)
def test_one_of_each_family(row: Isa, label: str) -> None:
    _check(row, label)


@pytest.mark.parametrize(
    "row", [row for row in ISAS.values() if row.name not in ROWS], ids=lambda r: r.name
)
def test_chips_run_their_rows(row: Isa) -> None:
    """Code scheduled for a chip runs on the processor that has its instructions."""
    _check(row, "conv: equals_the_definition 3x3 with margins")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("label", sorted(set(CASES) - set(QUICK)))
def test_every_shape(row: Isa, label: str) -> None:
    _check(row, label)


def test_the_neon_row_runs_on_the_oldest_cores() -> None:
    assert {PROCESSORS[name] for name in ROWS} == {"cortex-a53", "cortex-a76", "max"}
