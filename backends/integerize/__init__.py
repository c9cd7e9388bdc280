"""``integerize``: fake-quantized regions of a program become ``graphopt::`` operators on uint8 and int8 tensors.

``fq(relu(conv2d(fq(x), fq(w), b)))`` -> ``graphopt::conv2d``, the activation folded into the clamp. What has no integer
form stays float between ``dequantize`` and ``quantize``; the history record's declines say what stayed, and why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from graphopt.backends.integerize.lowering import Lowering
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.passing import Pass
from graphopt.program import Program

__all__ = ["Integerize", "integerize", "kept_in_float"]


@dataclass(frozen=True)
class Integerize(Pass):
    """``clamp(rint(v / s_y) + zp_y)`` of a float64 layer becomes ``rint(float32(acc) * (s_x * s_w / s_y))``.

    Outputs move by at most one quantization step where a rounding falls the other way. ``keep_float`` names nodes (by
    name or provenance) that stay float, ``reasons`` pairs of a node's name and why it does. ``measure`` runs the result in
    PyTorch, in float64 convolutions, for its error.
    """

    keep_float: tuple[str, ...] = ()
    measure: bool = True
    reasons: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "integerize"
    contract: ClassVar[Contract] = lossy

    def measured(self) -> bool:
        return self.measure

    def apply(self, edit: Edit) -> None:
        Lowering(edit, frozenset(self.keep_float), dict(self.reasons)).run()


def integerize(
    program: Program, keep_float: Collection[str] | Mapping[str, str] = (), measure: bool = True
) -> Program:
    """``program`` at the integer level: it still runs in PyTorch, and every compiled kernel equals it bit for bit.

    ``keep_float`` names nodes that stay float, by name or provenance; a mapping names them exactly and says why. Without
    ``measure`` the history record holds no error. Raises IntegerizeError for quantization parameters that no integer
    program can hold (a scale of zero or NaN, say).
    """
    if isinstance(keep_float, Mapping):
        return Integerize((), measure, tuple(sorted(keep_float.items())))(program)
    return Integerize(tuple(sorted(keep_float)), measure)(program)


def kept_in_float(program: Program) -> tuple[tuple[str, str], ...]:
    """``(node, reason)`` of every operator that the last ``integerize`` left in float."""
    for record in reversed(program.history):
        if record.name == Integerize.name:
            return record.declines
    return ()
