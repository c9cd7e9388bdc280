"""Registration in ``torch.library`` and the argument checks that the ``graphopt::`` operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import IntegerizeError
from graphopt.integer import arithmetic

NAMESPACE = "graphopt"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_QUANTIZED = (torch.uint8, torch.int8)


def register(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Define an operator: the decorated function on every device, ``fake`` for shapes."""

    def decorate(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return implementation

    return decorate


def require(holds: bool, op: str, argument: str, need: str) -> None:
    if not holds:
        raise IntegerizeError(f"graphopt::{op}: {argument} must be {need}")


def check_quantized(op: str, argument: str, q: Tensor, zero_point: int | None = None) -> None:
    """A uint8 or int8 tensor whose zero point lies within its type."""
    require(q.dtype in _QUANTIZED, op, argument, f"uint8 or int8, not {q.dtype}")
    if zero_point is None:
        return
    low, high = (0, 255) if q.dtype == torch.uint8 else (-128, 127)
    need = f"within {low}..{high} of {argument}, not {zero_point}"
    require(low <= zero_point <= high, op, f"{argument}'s zero point", need)


def output_dtype(op: str, zero_point: int, qmin: int, qmax: int) -> torch.dtype:
    dtype = arithmetic.dtype_of(qmin, qmax)
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    need = f"within {low}..{high}, not {zero_point}"
    require(low <= zero_point <= high, op, "the output's zero point", need)
    return dtype


def check_multiplier(op: str, multiplier: float) -> None:
    arithmetic.check_scale(multiplier, f"graphopt::{op}: the multiplier")
